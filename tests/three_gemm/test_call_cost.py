"""A budget of Python calls for a layer: on small layers they take longer than the GEMMs."""

import gc
import sys
from collections.abc import Callable
from types import FrameType

import pytest
import torch
from torch import nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.weight_cache import cached_weights, forget

BUDGET = {"dense": 75, "t-weights": 115, "training": 155}
"""Calls of a training step of one linear layer, eager PyTorch's 15 included."""


def python_calls(run: Callable[[], object]) -> int:
    count = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    forget(cached_weights())  # while a model of another test has any, each call looks for its own
    gc.collect()
    gc.disable()  # a collection in the midst would count the finalizers of other tests' objects
    with torch.autograd.set_multithreading_enabled(False):  # a profile sees its own thread only
        sys.setprofile(profile)
        try:
            run()
        finally:
            sys.setprofile(None)
            gc.enable()
    return count


@pytest.mark.parametrize("mode", BUDGET)
def test_a_training_step_of_a_layer_stays_within_its_budget(mode: str) -> None:
    x = torch.randn(16, 16, requires_grad=True)
    model = nmcompile.compile(nn.Sequential(nn.Linear(16, 16)), mode, config=CompileConfig(ends="sparse"))

    def step() -> None:
        model(x).sum().backward()

    step()
    torch.optim.SGD(model.parameters(), lr=0.0).step()  # from now on, the weight's version says enough
    step()
    assert python_calls(step) <= BUDGET[mode]


def test_a_call_without_gradients_stays_within_its_budget() -> None:
    x = torch.randn(16, 16)
    model = nmcompile.compile(nn.Sequential(nn.Linear(16, 16)), "weights", config=CompileConfig(ends="sparse"))
    with torch.no_grad():
        model(x)
        model(x)
        assert python_calls(lambda: model(x)) <= 65
