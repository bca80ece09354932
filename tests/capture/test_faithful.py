"""Forwards that a trace may replace; and tracing leaves no trace in the model."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nmcompile.capture import capture_model


class Unfaithful(nn.Module):
    """A base of forwards that a trace might wrongly replace."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.calls = 0
        self.log: list[int] = []
        self.gain = torch.ones(4)


class ModeDependent(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.w)
        return y * 2 if self.training else y


class Drops(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.linear(x, self.w), 0.5, self.training)


class DrawsMethod(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x + torch.rand_like(x), self.w)


class DrawsInPython(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.w)
        return y if random.random() < 1.0 else x


class DrawsInTraining(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.0:
            return x
        return F.linear(x, self.w)


class DrawsInNumPy(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        return x if np.random.rand() < 0.0 else F.linear(x, self.w)


class Constant(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w) + torch.arange(4.0)


class Counts(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.linear(x, self.w)


class Logs(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        self.log.append(1)
        return F.linear(x, self.w)


class Writes(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        self.gain.mul_(2)
        return F.linear(x, self.w)


class Checkpoints(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda t: F.linear(t, self.w), x, use_reentrant=False)


class AsksType(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w) if isinstance(x, Tensor) else F.linear(x[0], self.w)


class IsTensor(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w) if torch.is_tensor(x) else F.linear(x[0], self.w)


class WithoutGrad(Unfaithful):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class AsksAutocast(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.half() if torch.is_autocast_enabled() else x, self.w)


class UnderAutocast(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, self.w)


class AsksForNone(Unfaithful):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.w)
        return y if mask is None else y + mask


class ComparesTensors(Unfaithful):
    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        q = F.linear(query, self.w)
        return q if key is query else q + key


class Branches(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.w)
        return y if y.sum() > 0 else -y


class Spread(Unfaithful):
    def forward(self, *inputs: Tensor) -> Tensor:
        return F.linear(torch.cat([*inputs], -1), self.w)


UNFAITHFUL: dict[type[nn.Module], str] = {
    ModeDependent: "train() and eval() differ",
    Drops: "draws random numbers",
    DrawsMethod: "draws random numbers",
    DrawsInPython: "draws random numbers of Python",
    DrawsInTraining: "draws random numbers of Python",
    DrawsInNumPy: "draws random numbers of Python or NumPy",
    Constant: "tensor constant",
    Counts: "changes its attributes",
    Logs: "changes its attributes",
    Writes: "changes a tensor of the model",
    Checkpoints: "torch.utils.checkpoint",
    AsksType: "tests the type of an argument",
    IsTensor: "tests the type of an argument",
    WithoutGrad: "grad mode or autocast",
    AsksAutocast: "whether autocast is on",
    UnderAutocast: "grad mode or autocast",
    AsksForNone: "'mask' for None",
    ComparesTensors: "identity or type of a value",
    Branches: "TraceError",
    Spread: "TraceError",
}


def with_layer(module: nn.Module) -> nn.Module:
    """Return a model in which `module` is not the only thing to compile."""
    model = nn.Module()
    model.part, model.head = module, nn.Linear(4, 2)
    return model


class Linear(Unfaithful):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


@pytest.mark.parametrize("kind", UNFAITHFUL, ids=lambda kind: kind.__name__)
def test_unfaithful_traces_stay_python_and_change_nothing(kind: type[nn.Module]) -> None:
    model = with_layer(kind())
    state = {name: copy.deepcopy(value) for name, value in vars(model.part).items() if name in ("calls", "log", "gain")}
    drawn, python = torch.get_rng_state(), random.getstate()
    captured = capture_model(model)
    assert [site.layer.name for site in captured.sites] == ["head"]
    assert UNFAITHFUL[kind] in captured.python["part"]
    assert "part" not in captured.traces
    assert torch.equal(torch.get_rng_state(), drawn)
    assert random.getstate() == python
    for name, value in state.items():
        kept = getattr(model.part, name)
        assert torch.equal(kept, value) if isinstance(value, Tensor) else kept == value


def test_a_branch_on_a_number_that_python_draws_stays_random() -> None:
    class Skips(Unfaithful):
        def forward(self, x: Tensor) -> Tensor:
            return x if random.random() < 0.9 else F.linear(x, self.w)

    for seed in range(4):
        random.seed(seed)
        assert "draws random numbers of Python" in capture_model(with_layer(Skips())).python["part"]


def test_python_reason_names_the_layers_it_keeps() -> None:
    captured = capture_model(with_layer(next(iter(UNFAITHFUL))()))
    assert captured.python["part"].endswith("so it keeps F.linear on w")


def test_forward_on_the_instance_is_refused() -> None:
    part = Drops()
    part.forward = lambda x: x  # type: ignore[method-assign]
    assert "instance" in capture_model(with_layer(part)).python["part"]


def test_dropout_children_and_hooks_leave_a_module_faithful() -> None:
    class Fine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.drop = nn.Parameter(torch.randn(4, 4)), nn.Dropout(0.5)

        def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
            return self.drop(F.linear(x, self.w))

    model = Fine()
    model.register_forward_hook(lambda *_: None)
    captured = capture_model(model)
    assert [site.layer.name for site in captured.sites] == ["w"]
    assert not captured.python


def test_mode_of_the_model_does_not_matter() -> None:
    model = with_layer(Linear())
    assert capture_model(model.train()).sites == capture_model(model.eval()).sites
    assert not model.training
