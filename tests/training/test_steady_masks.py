"""The steady rule: masks change after steps only where a change gains enough, and after writes as if they were new."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import nmcompile
from nmcompile import CompileConfig
from nmcompile.training.find_masks import masks_of
from nmcompile.training.masks import WeightMask
from nmcompile.training.steady import PERIOD, discounted

PAIRS = list(itertools.combinations(range(4), 2))
X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
MODES = ["weights", "t-weights"]


def compiled(mode: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    model = nmcompile.compile(nn.Linear(8, 8).to(dtype), mode, config=CompileConfig(ends="sparse"))
    assert isinstance(model, nn.Linear)
    return model


def mask_of(model: nn.Module) -> WeightMask:
    (mask,) = masks_of(model).values()
    return mask


def worth(magnitudes: Tensor, kept: Tensor) -> Tensor:
    """Return the worth of each element to a steady mask: three quarters of its magnitude if it is pruned."""
    return torch.where(kept, 1.0, 0.75).double() * magnitudes.double()


def legal_tiles(mode: str) -> Tensor:
    """Return all 4x4 tiles with two in each row, and in each column if masks are transposable: (tiles, 4, 4) bool."""
    rows = [[i in pair for i in range(4)] for pair in PAIRS]
    tiles = torch.tensor(list(itertools.product(rows, repeat=4)))
    return tiles[(tiles.sum(1) == 2).all(1)] if mode == "t-weights" else tiles


def best_sums(worths: Tensor, mode: str) -> Tensor:
    """Return the most that a mask can keep of each tile of a matrix, by enumeration: (tile rows, tile columns)."""
    tiles = worths.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2)
    return torch.einsum("abij,tij->abt", tiles, legal_tiles(mode).double()).amax(-1)


def sums(worths: Tensor, mask: Tensor) -> Tensor:
    return (worths * mask).unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).sum((1, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(X.to(next(model.parameters()).dtype)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_each_period_keeps_the_most_of_what_counts(mode: str, dtype: torch.dtype) -> None:
    model = compiled(mode, dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    changes = 0
    for index in range(5):
        before, weight = mask_of(model).tensor.clone(), model.weight.detach().abs()
        worths = worth(weight, before) if index else weight.double()
        if dtype is torch.bfloat16:
            worths = worths.bfloat16().double()
        train(model, optimizer, 1)
        used = mask_of(model).tensor.clone()
        assert torch.allclose(sums(worths, used), best_sums(worths, mode), rtol=1e-12)
        changes += int((used != before).sum()) if index else 0
        train(model, optimizer, PERIOD - 1)
        assert torch.equal(mask_of(model).tensor, used)
    assert changes


@pytest.mark.parametrize(("rival", "changes"), [(1.3, False), (1.4, True)])
def test_a_pruned_weight_has_to_be_larger_by_a_third(rival: float, changes: bool) -> None:
    """It competes with a kept weight of magnitude 1."""
    model = compiled("weights")
    with torch.no_grad():
        model.weight.copy_(torch.tensor([3.0, 1.0, 0.5, 0.1]).repeat(8, 2))
        model(X)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        model.weight.grad = torch.zeros_like(model.weight)
        model.weight.grad[0, 2] = (0.5 - rival) / PERIOD
        for _ in range(PERIOD):
            optimizer.step()
        model(X)
    kept = [True, False, True, False] if changes else [True, True, False, False]
    assert mask_of(model).tensor[0, :4].tolist() == kept


@pytest.mark.parametrize("mode", MODES)
def test_a_rebuilt_mask_stays_for_the_same_weight(mode: str) -> None:
    model = compiled(mode)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    train(model, optimizer, PERIOD)
    model(X)
    once = mask_of(model).tensor.clone()
    train(model, torch.optim.SGD(model.parameters(), 0.0), PERIOD)
    model(X)
    assert mask_of(model).steps == 2 * PERIOD and torch.equal(mask_of(model).tensor, once)


def write(model: nn.Linear) -> None:
    with torch.no_grad():
        model.weight.copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))


def load(model: nn.Linear) -> None:
    model.load_state_dict(compiled("weights", seed=5).state_dict())


@pytest.mark.parametrize("due", [False, True])
@pytest.mark.parametrize("change", [write, load])
@pytest.mark.parametrize("mode", MODES)
def test_a_written_weight_gets_a_new_mask(mode: str, change: Callable[[nn.Linear], None], due: bool) -> None:
    """Also if a step had just made the mask stale, and if one does so before the next forward."""
    model = compiled(mode)
    train(model, torch.optim.SGD(model.parameters(), 0.02), PERIOD if due else PERIOD - 1)
    change(model)
    if not due:
        torch.optim.SGD(model.parameters(), 0.0).step()
    model(X)
    magnitudes = model.weight.detach().abs().double()
    assert torch.allclose(sums(magnitudes, mask_of(model).tensor), best_sums(magnitudes, mode), rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_preview_shows_the_next_mask(mode: str) -> None:
    model = compiled(mode)
    train(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), PERIOD)
    mask = mask_of(model)
    before, shown = mask.tensor.clone(), mask.preview(model.weight)
    assert mask.is_stale and torch.equal(mask.tensor, before) and not torch.equal(shown, before)
    model(X)
    assert torch.equal(mask.tensor, shown)


@pytest.mark.parametrize("steps", [PERIOD - 1, PERIOD, PERIOD + 1])
def test_a_compilation_goes_on_with_the_masks_of_the_last_one(steps: int) -> None:
    model = compiled("t-weights")
    train(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), steps)
    expected = copy.deepcopy(model)
    again = nmcompile.compile(model, "t-weights", config=CompileConfig(ends="sparse"))
    for one in (again, expected):
        assert isinstance(one, nn.Module)
        train(one, torch.optim.SGD(one.parameters(), 0.05), PERIOD + 1)
    assert torch.equal(mask_of(again).tensor, mask_of(expected).tensor)
    assert mask_of(again).steps == steps + PERIOD + 1


def net(mode: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.Flatten()
    return nmcompile.compile(nn.Sequential(*layers, nn.Linear(16, 4)), mode, config=CompileConfig(ends="sparse"))


def train_net(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 4, 5, 5, generator=generator), torch.randint(4, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict() | nmcompile.sparse_state_dict(model)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    states = state_of(one), state_of(other)
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


@pytest.mark.parametrize("stop", [PERIOD - 1, PERIOD, PERIOD + 1])
@pytest.mark.parametrize("mode", ["weights", "training"])
def test_resumed_equals_uninterrupted(mode: str, stop: int) -> None:
    """Stopped just before a rebuild, when one is due, and after it; resumed in a model of another seed."""
    end = 3 * PERIOD + 1
    whole, first, second = net(mode), net(mode), net(mode, seed=1)
    train_net(whole, optimizer_of(whole), 0, end)
    optimizer, resumed = optimizer_of(first), optimizer_of(second)
    train_net(first, optimizer, 0, stop)
    second.load_state_dict(first.state_dict())
    nmcompile.load_sparse_state_dict(second, nmcompile.sparse_state_dict(first))
    resumed.load_state_dict(optimizer.state_dict())
    train_net(second, resumed, stop, end)
    assert_same(whole, second)


def test_the_masks_of_such_runs_differ_from_new_ones() -> None:
    """So the test above would notice a mask that was computed anew."""
    model = net("weights")
    train_net(model, optimizer_of(model), 0, 3 * PERIOD + 1)
    kept = {name: mask.tensor.clone() for name, mask in masks_of(model).items()}
    other = net("weights", seed=1)
    other.load_state_dict(model.state_dict())
    other(torch.zeros(8, 4, 5, 5))
    assert any(not torch.equal(mask.tensor, kept[name]) for name, mask in masks_of(other).items())


@pytest.mark.parametrize("mode", ["weights", "training"])
def test_compiled_by_torch_it_trains_alike(mode: str) -> None:
    eager, traced = net(mode), net(mode)
    run = torch.compile(traced, backend="aot_eager")
    for model, called in ((eager, eager), (traced, run)):
        assert isinstance(called, nn.Module)
        train_net(called, optimizer_of(model), 0, 2 * PERIOD + 2)
    assert_same(eager, traced)


class Called(TorchDispatchMode):
    """A record of the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_pruned_weights_are_discounted_without_a_branch_at_each(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 8, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    weight[0, :6, 0, 0] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max])
    mask = torch.rand(weight.shape) < 0.5
    with Called() as called:
        result = discounted(weight, mask)
    assert "where" not in called.names
    assert result.stride() == weight.stride() and result.dtype == dtype
    expected = torch.where(mask, weight, weight * 0.75)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(result.signbit(), expected.signbit())
