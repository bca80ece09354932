"""Copies of a compiled model, by deepcopy, pickle or as an average, are compiled models of their own."""

import copy
import pickle
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig

ALL = CompileConfig(ends="sparse")


class Functional(nn.Module):
    """A module whose forward is generated from its graph, since it calls a functional linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).relu()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8)),
    "functional": lambda: nn.Sequential(nn.Linear(8, 8), Functional()),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0),
    "graph module": lambda: fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), Functional())),
}
COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}
# The class of a GraphModule exists only in its process.
CASES = [case for case in product(MODELS, COPIES) if case != ("graph module", "pickle")]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))


def compiled(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nmcompile.compile(MODELS[name](), config=ALL)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Take one step; return its output and gradients."""
    model.zero_grad()
    output = model(x)
    output.square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return [output, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize(("name", "copied"), CASES)
def test_a_copy_goes_on_as_the_model_does(name: str, copied: str, x: Tensor) -> None:
    """Includes draws of MVUE and steps of the masks."""
    model = compiled(name)
    step(model, x)
    replica = COPIES[copied](model)
    for _ in range(3):
        pairs = zip(step(model, x), step(replica, x), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    states = [nmcompile.sparse_state_dict(one) for one in (model, replica)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize(("name", "copied"), CASES)
def test_a_copy_shares_nothing(name: str, copied: str, x: Tensor) -> None:
    model = compiled(name)
    step(model, x)
    replica = COPIES[copied](model)
    before = {**model.state_dict(), **nmcompile.sparse_state_dict(model)}
    before = {key: value.clone() for key, value in before.items()}
    with torch.no_grad():
        for parameter in replica.parameters():
            parameter.copy_(torch.randn_like(parameter))
    step(replica, x)
    after = {**model.state_dict(), **nmcompile.sparse_state_dict(model)}
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@pytest.mark.parametrize(("name", "copied"), CASES)
def test_a_copy_reports_verifies_and_decompiles(name: str, copied: str, x: Tensor) -> None:
    model = compiled(name)
    step(model, x)
    replica = COPIES[copied](model)
    assert nmcompile.inspect(replica).to_json() == nmcompile.inspect(model).to_json()
    assert str(nmcompile.inspect(replica).layers[0].graphs) == str(nmcompile.inspect(model).layers[0].graphs)
    assert nmcompile.verify(replica, step=lambda: replica(x).sum().backward()).ok
    assert torch.equal(nmcompile.decompile(replica)(x), nmcompile.decompile(model)(x))


def test_averaged_model_runs_averaged_weights_under_the_masks_of_the_model(x: Tensor) -> None:
    sparse = compiled("layers")
    average = torch.optim.swa_utils.AveragedModel(sparse)
    for _ in range(3):
        average.update_parameters(sparse)
        average(x)
        step(sparse, x)
    average.update_parameters(sparse)
    sparse.eval()(x)
    masks = {k: v for k, v in nmcompile.sparse_state_dict(sparse).items() if k.endswith(".mask")}
    plain, averaged = MODELS["layers"]().eval(), average.module.state_dict()
    plain.load_state_dict({key: value * masks.get(f"{key}.mask", 1) for key, value in averaged.items()})
    torch.testing.assert_close(average.eval()(x), nmcompile.compile(plain, config=ALL)(x))


def test_values_with_a_history_that_a_module_keeps_do_not_hinder_finalize() -> None:
    """LeViT keeps its attention biases in a dict when it runs in eval()."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.bias, self.cache = nn.Linear(8, 8), nn.Parameter(torch.randn(8)), dict[str, Tensor]()

        def forward(self, x: Tensor) -> Tensor:
            self.cache["bias"] = self.bias * 2
            result: Tensor = self.body(x) + self.cache["bias"]
            return result

    x = torch.randn(4, 8)
    model = nmcompile.compile(Cached(), "weights", config=CompileConfig(ends="sparse"))
    expected = model(x)
    final = nmcompile.finalize(model)
    assert isinstance(final, Cached) and final.cache["bias"].is_leaf
    torch.testing.assert_close(final(x), expected)
