"""Recompiling a compiled model: it is planned again, masks that meet the new pattern are kept; and decompiling it."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig, ThreeGemm, presets

ALL = CompileConfig(ends="sparse")


class Functional(nn.Module):
    """A module whose forward is generated from its graph, since it calls a functional linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).relu()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(8, 8), Functional(), encoder, nn.Linear(8, 8))


def masks(model: nn.Module) -> dict[str, Tensor]:
    state = nmcompile.sparse_state_dict(model)
    return {name: tensor for name, tensor in state.items() if name.endswith(".mask")}


def trained(mode: str) -> nn.Module:
    """Compile and run a layer, then change its weight by a step that does not refresh the mask."""
    torch.manual_seed(0)
    model = nmcompile.compile(nn.Linear(8, 8), mode, config=ALL)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("after", ["weights", "t-weights", "training"])
def test_transposable_mask_survives(after: str, inplace: bool) -> None:
    """It is a valid row-wise mask too, though not the one that the weight would get today."""
    model = trained("training")
    kept = masks(model)["weight.mask"]
    again = nmcompile.compile(model, after, config=ALL, inplace=inplace)
    again(torch.randn(4, 8))
    fresh = nmcompile.compile(nmcompile.decompile(model), after, config=ALL)
    fresh(torch.randn(4, 8))
    assert torch.equal(masks(again)["weight.mask"], kept)
    assert not torch.equal(masks(fresh)["weight.mask"], kept)


def test_rowwise_mask_that_is_not_transposable_is_computed_anew() -> None:
    model = trained("weights")
    again = nmcompile.compile(model, "training", config=ALL)
    again(torch.randn(4, 8))
    kept = masks(again)["weight.mask"]
    assert not torch.equal(kept, masks(model)["weight.mask"])
    assert bool((kept.unflatten(0, (-1, 4)).sum(1) == 2).all())


@pytest.mark.parametrize("inplace", [False, True])
def test_the_new_plan_replaces_the_old_one(inplace: bool) -> None:
    sparse = nmcompile.compile(network())
    again = nmcompile.compile(sparse, "gradients", inplace=inplace)
    assert (again is sparse) == inplace
    assert nmcompile.inspect(again).mode == "gradients"
    assert not masks(again)
    assert nmcompile.inspect(sparse).mode == ("gradients" if inplace else "training")


def test_a_compiled_part_is_planned_anew_with_the_whole_and_keeps_its_mask(x: Tensor) -> None:
    whole = network()
    whole[0] = nmcompile.compile(whole[0], config=ALL)
    whole[0](x)
    kept = masks(whole[0])["weight.mask"]
    sparse = nmcompile.compile(whole, "weights")
    assert nmcompile.inspect(sparse).mode == "weights"
    assert torch.equal(masks(sparse)["0.weight.mask"], kept)
    assert nmcompile.inspect(sparse).layer("0").reasons[0].startswith("first layer, but an earlier compilation")
    assert isinstance(whole[0], ThreeGemm) and nmcompile.inspect(whole).mode == "training"
    plain = nmcompile.compile(nmcompile.decompile(whole), "weights")
    assert not isinstance(plain.get_submodule("0"), ThreeGemm)
    assert torch.equal(plain(x), nmcompile.compile(network(), "weights")(x))


@pytest.mark.parametrize("before", presets)
def test_recompiled_equals_compiled_from_dense(before: str, x: Tensor) -> None:
    dense = network()
    direct = nmcompile.compile(dense, "training")
    again = nmcompile.compile(nmcompile.compile(dense, before), "training")
    results = []
    for model in (direct, again):
        output = model(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("mode", presets)
def test_decompile_gives_classes_and_forwards_back(mode: str, x: Tensor) -> None:
    dense = network()
    sparse = nmcompile.compile(dense, mode)
    plain = nmcompile.decompile(sparse)
    assert not any(isinstance(module, ThreeGemm) for module in plain.modules())
    for mine, theirs in zip(plain.modules(), dense.modules(), strict=True):
        assert type(mine) is type(theirs) and set(mine.__dict__) == set(theirs.__dict__)
    assert all(mine is theirs for mine, theirs in zip(plain.parameters(), dense.parameters(), strict=True))
    for training in (True, False):
        assert torch.equal(plain.train(training)(x), dense.train(training)(x))


def test_decompile_leaves_the_compiled_model_compiled(x: Tensor) -> None:
    sparse = nmcompile.compile(network())
    output = sparse(x)
    nmcompile.decompile(sparse)
    assert torch.equal(sparse(x), output)
    assert any(isinstance(module, ThreeGemm) for module in sparse.modules())


def test_decompiled_graph_module_is_the_plain_graph(x: Tensor) -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), Functional(), nn.Linear(8, 8)))
    plain = nmcompile.decompile(nmcompile.compile(traced))
    assert isinstance(plain, fx.GraphModule) and not isinstance(plain, ThreeGemm)
    assert torch.equal(plain(x), traced(x))
