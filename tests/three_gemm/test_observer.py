"""One door to what flows through a layer: it opens for whoever looks, and closes without a trace."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, Phase
from nmcompile.api.measure_phases import find_dense_phases
from nmcompile.errors import StateError
from nmcompile.three_gemm.absorbed_norm import AbsorbedNorm
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import Observer, Results, Values, observing
from nmcompile.three_gemm.triple import GemmTriple

X = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """The second layer is called first; a norm is absorbed; attention runs several layers in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.first = nn.Conv2d(4, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.look: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x.relu())).relu()
        tokens = self.second(y).relu().flatten(2).transpose(1, 2)
        self.look()
        result: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return result


@pytest.fixture
def dense() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def model(dense: Net) -> Any:
    config = CompileConfig(ends="sparse", outputs="int8")
    compiled = nmcompile.compile(dense, "inference", args=(X,), config=config, calibration=[X]).eval()
    assert isinstance(compiled.norm, AbsorbedNorm)
    return compiled


def held(model: nn.Module) -> list[Any]:
    """Return the attributes of each module and of each triple, by identity; hooks may differ."""
    owners: list[Any] = [*model.modules(), *triples_of(model)]
    return [(id(owner), type(owner), sorted(_entries(owner))) for owner in owners]


def _entries(owner: Any) -> Iterator[tuple[str, int]]:
    mutable = {"observer", "called", "positions", "look", *(name for name in vars(owner) if "hooks" in name)}
    for name, value in vars(owner).items():
        if name not in mutable:
            yield name, id(value)
        if name == "three_gemms":
            yield from ((role, id(triple)) for role, triple in value.items())


def calibrate(dense: Net, model: Net, path: Path) -> None:
    nmcompile.calibrate(model, [X])


def compare(dense: Net, model: Net, path: Path) -> None:
    nmcompile.compare(dense, model, X)


def verify(dense: Net, model: Net, path: Path) -> None:
    nmcompile.verify(model, step=lambda: model(X))


def measure(dense: Net, model: Net, path: Path) -> None:
    find_dense_phases(model, (X,), None)


def export(dense: Net, model: Net, path: Path) -> None:
    nmcompile.export(model, path / "m.onnx", (X,))


Look = Callable[[Net, Net, Path], None]
LOOKS: list[Look] = [calibrate, compare, verify, measure, export]


@pytest.mark.parametrize("look", LOOKS)
def test_looking_at_a_model_writes_nothing_on_it(look: Look, dense: Net, model: Any, tmp_path: Path) -> None:
    before, seen, observed = held(model), [], []

    def note() -> None:
        seen.append(held(model))
        observed.append(any(triple.observer for triple in triples_of(model)))

    model.look = note
    look(dense, model, tmp_path)
    assert any(observed)
    assert all(one == before for one in seen)
    assert held(model) == before
    assert not any(triple.observer for triple in triples_of(model))


@pytest.mark.parametrize("look", LOOKS)
def test_an_exception_leaves_no_observer(look: Look, dense: Net, model: Any, tmp_path: Path) -> None:
    expected = model(X)

    def fail() -> None:
        if any(triple.observer for triple in triples_of(model)):
            raise KeyError("stop")

    model.look = fail
    with pytest.raises((KeyError, nmcompile.NMCompileError), match="stop"):
        look(dense, model, tmp_path)
    assert not any(triple.observer for triple in triples_of(model))
    assert torch.equal(model(X), expected)


def test_an_observer_changes_nothing_by_itself(model: Net) -> None:
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    with observing(triples_of(model), Observer):
        output = model(x)
        got = torch.autograd.grad(output.square().sum(), [x, *model.parameters()])
    assert torch.equal(output, model(x))
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@torch.no_grad()
def test_what_it_runs_can_be_replaced(model: Net) -> None:
    """Operands of a layer, and an absorbed norm."""

    class Zeros(Observer):
        def run(self, phase: Phase, values: Values) -> Results:
            input = values["input"]
            assert input is not None
            return super().run(phase, {**values, "input": torch.zeros_like(input)})

        def run_norm(self, norm: AbsorbedNorm, input: Tensor) -> Tensor:
            return super().run_norm(norm, input) + 1

    first = next(triple for triple in triples_of(model) if triple.layer.name == "first")
    with observing([first], Zeros):
        got = model.norm(model.first(X))
    assert torch.equal(got, model.norm(torch.zeros(8, 16, 6, 6)) + 1)


def test_two_at_once_are_refused(dense: Net, model: Net) -> None:
    first, *_ = triples_of(model)
    with observing([first], Observer):
        outer = first.observer
        with pytest.raises(StateError, match="layer 'second' is observed already"):
            nmcompile.verify(model, step=lambda: None)
        assert first.observer is outer
    with pytest.raises(StateError, match="do not call calibrate, compare"):
        nmcompile.verify(model, step=lambda: nmcompile.compare(dense, model, X))
    assert not any(triple.observer for triple in triples_of(model))


def test_a_copy_is_not_observed(model: Net) -> None:
    with observing(triples_of(model), Observer):
        replica = copy.deepcopy(model)
    assert not any(triple.observer for triple in triples_of(replica))
    assert torch.equal(replica(X), model(X))


def test_layers_are_compared_in_the_order_of_their_calls(dense: Net, model: Net) -> None:
    names = [layer.layer for layer in nmcompile.compare(dense, model, X).layers]
    assert names == ["first", "second", "attention.in_proj", "attention.out_proj"]


@torch.no_grad()
def test_nobody_looking_costs_one_look_at_the_slot(model: Net) -> None:
    reads: list[str] = []

    class Counted(GemmTriple):
        @property
        def observer(self) -> None:  # type: ignore[override]
            reads.append(self.layer.name)

    triple = next(triple for triple in triples_of(model) if triple.layer.name == "second")
    del triple.observer
    triple.__class__ = Counted
    model(X)
    assert reads == ["second"]
