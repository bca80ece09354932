"""Capture leaves the model and every random state unchanged, also if it raises."""

import random
import sys
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmcompile.capture import capture_model
from nmcompile.capture.state import RandomStates, random_states, unchanged
from nmcompile.errors import CaptureError


class Meddles(nn.Module):
    """A module whose forward changes everything in its reach, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.w = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 4))
        self.seen, self.table, self.config = deque([1]), {"a": [1]}, SimpleNamespace(steps=0)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(2)
        self.table["a"].append(2)
        self.config.steps += 1
        self.fc.extra = 1  # type: ignore[assignment]
        self.count = torch.ones(())
        torch.rand(3), random.random(), np.random.rand()
        return self.fc(F.linear(x, self.w))


def assert_untouched(model: Meddles) -> None:
    assert model.seen == deque([1])
    assert model.table == {"a": [1]}
    assert model.config.steps == 0
    assert "extra" not in vars(model.fc)
    assert model.count.item() == 0
    assert model.training


def plain(states: RandomStates) -> list[object]:
    numpy: Any = states.python.numpy
    return [states.torch.tolist(), states.python.python, numpy[1].tolist(), numpy[2:]]


@pytest.mark.parametrize("args", [None, (torch.ones(2, 4),), (torch.ones(2, 5),)], ids=["fx", "export", "refused"])
def test_a_meddling_forward_leaves_no_mark(args: tuple[Tensor] | None) -> None:
    model = Meddles()
    before = plain(random_states())
    if args and args[0].shape[1] == 5:
        with pytest.raises(CaptureError, match="does not accept"):
            capture_model(model, args)
    else:
        captured = capture_model(model, args)
        kept = captured.python.get("", "")
        assert captured.routes == {"": {"w": "w"}} if args else kept.endswith("so it keeps F.linear on w")
    assert plain(random_states()) == before
    assert_untouched(model)


def test_grad_mode_and_profiler_survive() -> None:
    def profile(*_: Any) -> None: ...

    sys.setprofile(profile)
    try:
        with torch.no_grad():
            capture_model(Meddles())
            assert not torch.is_grad_enabled()
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)


def test_changes_are_undone_after_an_error() -> None:
    def run_and_fail() -> None:
        with unchanged(model) as memory:
            model(torch.ones(1, 4))
            assert memory.changed()
            raise ZeroDivisionError

    model = Meddles()
    with pytest.raises(ZeroDivisionError):
        run_and_fail()
    assert_untouched(model)


def test_nothing_to_compile_leaves_the_random_state() -> None:
    before = plain(random_states())
    with pytest.raises(CaptureError):
        capture_model(nn.Dropout())
    assert plain(random_states()) == before
