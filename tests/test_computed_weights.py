"""Weights that are not parameters: computed by hooks, by parametrizations, or in forward. Models in `torch.compile`."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from timm.layers.std_conv import ScaledStdConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import nmcompile
from nmcompile import CompileConfig
from nmcompile.errors import PassError
from nmcompile.training import step

ALL = CompileConfig(ends="sparse")
WRAPS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.2),
    "prune twice": lambda layer: prune.random_unstructured(prune.l1_unstructured(layer, "weight", 0.2), "weight", 0.2),
    "parametrized": parametrizations.weight_norm,
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def wrapped(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hook-style norms are deprecated, but in use
        layer = WRAPS[name](nn.Linear(16, 16))
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), layer, nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize("mode", ["t-weights", "inference"])
def test_finalize_makes_a_computed_weight_a_parameter(name: str, mode: str, x: Tensor) -> None:
    """Also right after a step, when the attribute is the previous weight, with a history that torch cannot copy."""
    dense = wrapped(name)
    model = nmcompile.compile(dense, mode, calibration=[x] if mode == "inference" else None)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(x).square().mean().backward()
    optimizer.step()
    model.eval()
    final = nmcompile.finalize(model).eval()
    keys = set(model.state_dict())
    expected, weight = model(x), final.get_parameter("2.weight")
    if mode == "t-weights":
        torch.testing.assert_close(final(x), expected, rtol=0, atol=0)
    assert bool((weight.unflatten(1, (-1, 4)) != 0).sum(-1).le(2).all()) and bool(weight.any())
    assert nmcompile.verify(final).ok and "2.weight" in {check.name for check in nmcompile.verify(final).checks}
    assert "2.weight" in {check.name for check in nmcompile.verify(model).checks}
    assert not final.get_submodule("2")._forward_pre_hooks and type(final.get_submodule("2")) is nn.Linear
    assert set(model.state_dict()) == keys and torch.equal(model(x), expected)


@pytest.mark.parametrize("name", WRAPS)
def test_decompile_gives_the_hooks_back(name: str, x: Tensor) -> None:
    dense = wrapped(name)
    model = nmcompile.compile(dense, "weights")
    model(x).sum().backward()
    plain = nmcompile.decompile(model)
    assert len(plain.get_submodule("2")._forward_pre_hooks) == len(dense.get_submodule("2")._forward_pre_hooks)
    assert torch.equal(plain.eval()(x), dense.eval()(x))


def test_a_hook_of_ones_own_is_an_error_that_names_the_layer(x: Tensor) -> None:
    layer = nn.Linear(16, 16)
    source = nn.Parameter(layer.weight.detach().clone())
    del layer.weight
    layer.register_parameter("weight_source", source)
    layer.register_forward_pre_hook(lambda module, inputs: setattr(module, "weight", module.weight_source * 2))
    layer.__dict__["weight"] = source.detach() * 2
    model = nmcompile.compile(nn.Sequential(nn.Linear(16, 16), layer, nn.Linear(16, 16)), "weights")
    model(x).sum().backward()
    with pytest.raises(
        PassError, match=r"layer '1': its weight is set by a hook .*CompileConfig\(layers=\{'1': None\}\)"
    ):
        nmcompile.finalize(model)
    assert nmcompile.decompile(model)(x).shape == (8, 16)


class Experts(nn.Module):
    """One layer for each slice of a parameter of three dims."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 16)), nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        for expert in range(3):
            x = F.linear(F.silu(F.linear(x, self.up[expert])), self.down[expert])
        return x


class Pieces(nn.Module):
    """Views of one matrix: rows, columns, transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(48, 16))
        self.packed = nn.Parameter(torch.randn(256))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.weight.chunk(3)
        x = F.linear(x, query) + F.linear(x, key.t())
        return F.linear(F.linear(x, value), self.packed.view(16, 16))


@pytest.mark.parametrize("mode", ["weights", "t-weights"])
@pytest.mark.parametrize("make", [Experts, Pieces])
def test_a_slice_of_a_parameter_holds_the_zeros(make: type[nn.Module], mode: str, x: Tensor) -> None:
    model = nmcompile.compile(nn.Sequential(nn.Linear(16, 16), make(), nn.Linear(16, 4)), mode)
    layers = [layer for layer in nmcompile.inspect(model).layers if layer.name.startswith("1.")]
    assert len(layers) == (6 if make is Experts else 4)
    model(x).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    step(model)
    output, before = model(x), copy.deepcopy(model.state_dict())
    final = nmcompile.finalize(model)
    assert torch.equal(final(x), output)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: p.shape for name, p in final.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    zeros = [(p == 0).float().mean() for name, p in final.named_parameters() if name.startswith("1.")]
    assert torch.equal(torch.stack(zeros), torch.full((len(zeros),), 0.5))
    checked = nmcompile.verify(final)
    assert checked.ok and len({check.name for check in checked.checks}) == len(layers)
    with torch.no_grad():
        next(p for name, p in final.named_parameters() if name.startswith("1.")).fill_(1.0)
    assert not nmcompile.verify(final).ok
    assert nmcompile.verify(model).ok and len(nmcompile.verify(model).checks) >= len(layers)


def test_slices_that_overlap_are_an_error(x: Tensor) -> None:
    class Overlapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(24, 16))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weight[:16]), self.weight[8:].t())

    model = nmcompile.compile(nn.Sequential(nn.Linear(16, 16), Overlapping()), "weights", config=ALL)
    model(x)
    with pytest.raises(PassError, match="another layer uses a part of its weight, and is pruned differently"):
        nmcompile.finalize(model)


def test_a_standardized_weight_is_an_error_that_says_what_to_do() -> None:
    torch.manual_seed(0)
    conv = ScaledStdConv2d(8, 8, 3)
    model = nmcompile.compile(nn.Sequential(nn.Conv2d(3, 8, 3), conv, nn.Conv2d(8, 8, 1)), "weights").eval()
    model(torch.randn(1, 3, 8, 8))
    (check,) = (check for check in nmcompile.verify(model).checks if check.name.startswith("1."))
    assert check.blocks and not check.violations
    with pytest.raises(PassError, match=r"layer '1': its weight is computed in forward.*layers=\{'1': None\}"):
        nmcompile.finalize(model)


def test_a_computed_weight_is_in_one_graph_of_torch_compile(x: Tensor) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(16, 16), weight_norm(nn.Linear(16, 16)), nn.Linear(16, 4))
    model = nmcompile.compile(net, "t-weights")
    optimizer, run = torch.optim.SGD(model.parameters(), 0.1), torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(run(x), model(x))
        model(x).square().sum().backward()
        optimizer.step()


def compiled_by_torch(net: nn.Module, how: str) -> nn.Module:
    if how == "wrapped":
        return torch.compile(net, backend="eager")  # type: ignore[return-value]
    if how == "a child":
        net.get_submodule("2").compile(backend="eager")
        return net
    net.register_module("2", torch.compile(net.get_submodule("2"), backend="eager"))  # type: ignore[arg-type]
    return net


# Dynamo looks at the gradient of the output of the layer before a wrapped one.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("how", "inplace"), [("wrapped", False), ("wrapped", True), ("a child", True), ("a wrapped child", False)]
)
def test_what_torch_compiled_before(how: str, inplace: bool, x: Tensor) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), inner, nn.ReLU(), nn.Linear(16, 4))
    plain = copy.deepcopy(net)
    expected = nmcompile.compile(plain, "weights")(x)
    source = compiled_by_torch(net, how)
    source(x)
    model = nmcompile.compile(source, "weights", args=(x,), inplace=inplace)
    assert torch.equal(model(x), expected)
    assert type(model) is nn.Sequential and (model is net) == inplace
    assert [layer.status for layer in nmcompile.inspect(model).layers] == ["dense", "sparse", "sparse", "dense"]
    assert nmcompile.verify(model).ok and len(nmcompile.verify(model).checks) == 2
    assert torch.equal(nmcompile.decompile(model)(x), plain(x))
    assert torch.equal(nmcompile.finalize(model)(x), expected)
    replica = copy.deepcopy(model)
    assert torch.equal(replica(x), expected) and nmcompile.inspect(replica).layers
    nmcompile.load_sparse_state_dict(replica, nmcompile.sparse_state_dict(model))
    assert [layer.status for layer in nmcompile.analyze(source, "weights").layers].count("sparse") == 2
    if how.startswith("wrapped"):
        assert list(model.state_dict()) == list(plain.state_dict())
        model(x).sum().backward()
        assert all(a.grad is not None for a in net.parameters())
