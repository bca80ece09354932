"""With example inputs every generated forward runs once beside its original, and stays Python if they differ."""

import itertools
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmcompile
from nmcompile.capture import capture_model, tracer, watch_calls
from nmcompile.capture.replay import differences
from nmcompile.capture.routes import Routes

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Region(nn.Module):
    """A module that calls `F.linear`, so its forward would be generated."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))


class Model(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.head = nn.ModuleList(parts), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(x), [part(x) for part in self.parts]


class Branches(Region):
    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.w)
        return h if x.grad_fn is not None else h * 3


class Named(Region):
    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(y=F.linear(x, self.w))


class Fine(Region):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bytecode prove nothing, which leaves only the comparison."""
    monkeypatch.setattr(watch_calls, "unseen_tests", lambda *_: ())
    monkeypatch.setattr(tracer, "PLAIN_CONTAINERS", (*tracer.PLAIN_CONTAINERS, OrderedDict))


@pytest.fixture
def unrouted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave products in Python code dense."""
    monkeypatch.setattr("nmcompile.capture.model.find_routes", lambda *_: Routes())


@pytest.mark.usefixtures("unproven", "unrouted")
@pytest.mark.parametrize(
    ("kind", "difference"),
    [(Branches, "its output has other values"), (Named, "its output is of class dict, not OrderedDict")],
)
def test_a_forward_that_differs_stays_python(kind: type[Region], difference: str) -> None:
    model = Model(kind(), Fine())
    assert set(capture_model(model).traces) == {"parts.0", "parts.1"}
    captured = capture_model(model, (X,))
    assert set(captured.traces) == {"parts.1"}
    assert difference in captured.python["parts.0"]
    assert captured.python["parts.0"].endswith("so it keeps F.linear on w")
    compiled = nmcompile.compile(model, "dense", args=(X,))
    (head, (part, fine)), (expected_head, (expected, expected_fine)) = compiled(X), model(X)
    assert not any(differences((expected_head, expected, expected_fine), (head, part, fine), "it"))


def test_the_comparison_leaves_no_trace() -> None:
    class Child(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("calls", torch.zeros(()))
            self.log: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.log.append(1)
            y: Tensor = self.norm(x + torch.rand_like(x) + self.calls)
            return y

    class Parent(Region):
        def __init__(self) -> None:
            super().__init__()
            self.child = Child()

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.child(x), self.w)

    model, x = Model(Parent()).train(), X.clone().requires_grad_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    captured = capture_model(model, (x,))
    assert set(captured.traces) == {"parts.0"}
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.parts[0].child.log == []
    assert all(module.training and "forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(x, X)
    assert x.grad is None


def test_code_that_differs_from_itself_is_no_measure() -> None:
    counter = itertools.count()

    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + next(counter)

    class Parent(Region):
        def __init__(self) -> None:
            super().__init__()
            self.child = Counts()

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.child(x), self.w)

    assert set(capture_model(Model(Parent()), (X,)).traces) == {"parts.0"}


def test_inputs_that_are_written_to_are_compared_too() -> None:
    class Writes(Region):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.mul_(2), self.w)

    given = X.clone()
    captured = capture_model(Model(Writes(), Fine()), (given,))
    assert set(captured.traces) == {"parts.0", "parts.1"}
    assert torch.equal(given, X)


def test_a_model_that_does_not_run_in_eval_mode_is_still_compiled() -> None:
    class TrainsOnly(Model):
        def forward(self, x: Tensor) -> Any:
            if not self.training:
                raise RuntimeError("no labels")
            return super().forward(x)

    assert set(capture_model(TrainsOnly(Fine()).train(), (X,)).traces) == {"parts.0"}


def test_a_product_that_became_a_linear_layer_may_round_differently() -> None:
    close, far = X + 1e-5 * X.abs().max(), X + 1e-2 * X.abs().max()
    assert next(differences(X, close, "it"), "") == "it has other values"
    assert next(differences(X, close, "it", is_exact=False), "") == ""
    assert next(differences(X, far, "it", is_exact=False), "") == "it has other values"


NAN = torch.tensor([float("nan"), 1.0])


@pytest.mark.parametrize(
    ("expected", "found", "said"),
    [
        ({"a": (X, None)}, {"a": (X.clone(), None)}, ""),
        (NAN, NAN.clone(), ""),
        (X, X + 1, "it has other values"),
        (X, X.double(), "it is float64[2, 4] on cpu, not float32[2, 4] on cpu"),
        ([X, X], [X], "it has 1 items, not 2"),
        ({"a": X}, {"b": X}, "it has other keys"),
        ((1, "a"), (1, "b"), "it[1] is 'b', not 'a'"),
        ((X, None), (X, X), "it[1] is of class Tensor, not NoneType"),
        (X.to_sparse(), X.to_sparse() * 2, "it has other values"),
    ],
)
def test_differences_in_structure_and_values(expected: Any, found: Any, said: str) -> None:
    assert next(differences(expected, found, "it"), "") == said
