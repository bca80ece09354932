"""State that `compile` must not change: the given model, after an error or an analysis, and the random state."""

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig, NMCompileError, NMPattern, Pruning, ThreeGemm


class Tied(nn.Module):
    """A model with a hook, a buffer, a plain attribute, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)
        self.right.weight = self.left.weight
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        self.history: list[int] = []
        self.left.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        scores: Tensor = self.head(self.norm(self.left(x) + self.right(x)))
        return scores


class Restless(nn.Module):
    """A module that draws random numbers and changes itself in every forward, traced ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tied()
        self.calls = 0
        self.history: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(self.calls)
        noise = torch.rand(()).item() + random.random() + float(np.random.rand())
        scores: Tensor = self.inner(x) + noise
        return scores


def weight(operator: str, pattern: str) -> LayerConfig:
    return LayerConfig(weight=Pruning(operator, NMPattern.parse(pattern)))


FAILURES: dict[str, dict[str, Any]] = {
    "unknown mode": {"mode": "trainings"},
    "unknown backend": {"backend": "cpus"},
    "unknown layer": {"config": CompileConfig(layers={"lef": None})},
    "pattern does not fit": {"config": CompileConfig(layers={"left": weight("greedy", "2:5")})},
    "arguments refused": {"args": (torch.zeros(2, 7),)},
    "one weight, two masks": {
        "config": CompileConfig(layers={"left": weight("greedy", "2:4"), "right": weight("greedy", "1:2")})
    },
    "calibration refused": {"mode": "inference", "calibration": [torch.zeros(2, 7)]},
    "score that is no number": {"validation": lambda model: "good", "max_drop": 0.1},
    "nothing to measure with": {"config": CompileConfig(where="pays")},
}


def snapshot(model: nn.Module) -> list[Any]:
    """Return all attributes of the modules: by identity if they cannot be compared, containers by content."""
    return [
        (name, id(module), type(module), _held(module.__dict__), [p._version for p in module.parameters()])
        for name, module in model.named_modules()
    ]


def _held(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _held(item)) for key, item in value.items()]
    return [id(item) for item in value] if isinstance(value, list) else id(value)


@pytest.fixture
def restless() -> Restless:
    torch.manual_seed(0)
    return Restless().eval()


def random_numbers() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def seed_all() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(0)
    return Tied().eval()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_failing_compile_changes_nothing(failure: str, inplace: bool, model: Tied) -> None:
    x = torch.randn(2, 6)
    before, output = snapshot(model), model(x)
    with pytest.raises(NMCompileError):
        nmcompile.compile(model, **FAILURES[failure], inplace=inplace)
    assert snapshot(model) == before
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_failing_recompile_leaves_a_compiled_model_compiled(failure: str, inplace: bool, model: Tied) -> None:
    x = torch.randn(2, 6)
    sparse = nmcompile.compile(model, "weights")
    before, output = snapshot(sparse), sparse(x)
    with pytest.raises(NMCompileError):
        nmcompile.compile(sparse, **FAILURES[failure], inplace=inplace)
    assert snapshot(sparse) == before
    assert isinstance(sparse.get_submodule("left"), ThreeGemm)
    assert torch.equal(sparse(x), output)


@pytest.mark.parametrize("act", [nmcompile.compile, nmcompile.analyze])
@pytest.mark.parametrize("args", [None, (torch.zeros(2, 6),)])
@pytest.mark.parametrize("training", [False, True])
def test_neither_compile_nor_analyze_touches_what_it_is_given(
    act: Callable[..., Any], args: tuple[Tensor] | None, training: bool, restless: Restless
) -> None:
    model = restless.train(training)
    before, buffers = snapshot(model), {name: value.clone() for name, value in model.named_buffers()}
    act(model, args=args)
    assert snapshot(model) == before
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("act", [nmcompile.compile, nmcompile.analyze])
@pytest.mark.parametrize("args", [None, (torch.zeros(2, 6),)])
def test_random_states_stay(act: Callable[..., Any], args: tuple[Tensor] | None, restless: Restless) -> None:
    seed_all()
    expected = random_numbers()
    seed_all()
    act(restless, args=args)
    assert random_numbers() == expected


def test_analyze_of_a_compiled_model_leaves_it_compiled(model: Tied) -> None:
    sparse = nmcompile.compile(model, "weights")
    before = snapshot(sparse)
    assert nmcompile.analyze(sparse, "training").mode == "training"
    assert snapshot(sparse) == before
    assert nmcompile.inspect(sparse).mode == "weights"


def test_uncopyable_model_is_refused_but_compiles_in_place() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(nmcompile.NMCompileError, match="inplace=True"):
        nmcompile.compile(model)
    assert nmcompile.compile(model, inplace=True) is model
