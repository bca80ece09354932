"""Models that `compile` returns: the three GEMMs of each mode, in a module that is still the user's own."""

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig, Phase, ThreeGemm, presets
from nmcompile.ir.node_meta import meta_of, nodes_of_kind

ALL = CompileConfig(ends="sparse")


class Net(nn.Sequential):
    """Convolutions, norms and linears; the first conv and the last linear stay dense by default."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 4),
        )  # fmt: skip


class StandardizedConv(nn.Conv2d):
    """A subclass with its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.standardized(), self.bias, self.stride, self.padding)

    def standardized(self) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return self.weight - mean


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def rowwise(weight: Tensor) -> Tensor:
    """Compute the 2:4 mask along the last dim by sorting each block."""
    blocks = weight.detach().abs().unflatten(-1, (-1, 4))
    kept = torch.zeros_like(blocks, dtype=torch.bool).scatter(-1, blocks.topk(2).indices, True)
    return kept.flatten(-2)


def best_tile(weight: Tensor) -> Tensor:
    """Find the best 4x4 mask with two kept in every row and column by trying all of them."""
    rows = [torch.tensor(row) for row in product((0, 1), repeat=4) if sum(row) == 2]
    tiles = (torch.stack(choice) for choice in product(rows, repeat=4))
    valid = [tile for tile in tiles if bool((tile.sum(0) == 2).all())]
    return max(valid, key=lambda tile: float((tile * weight.detach().abs()).sum())).bool()


def gradients(layer: nn.Module, x: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Return the output, dX, dW and db."""
    leaf = x.clone().requires_grad_()
    output = layer(leaf)
    found = torch.autograd.grad(output, [leaf, *layer.parameters()], grad_output)
    return output.detach(), *found


@pytest.mark.parametrize("mode", ["weights", "t-weights"])
def test_masked_weights_in_forward_and_backward_and_a_straight_through_update(mode: str) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(4, 4)
    sparse = nmcompile.compile(dense, mode, config=ALL)
    x, dy = torch.randn(8, 4), torch.randn(8, 4)
    pruned = dense.weight.detach() * (rowwise(dense.weight) if mode == "weights" else best_tile(dense.weight))
    expected = F.linear(x, pruned, dense.bias.detach()), dy @ pruned, dy.T @ x, dy.sum(0)
    for got, wanted in zip(gradients(sparse, x, dy), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_pruned_activations_and_gradients_that_share_their_mask() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.ReLU(), nn.Linear(8, 8))
    sparse = nmcompile.compile(dense, "activations", config=ALL)
    x, dy = torch.rand(5, 8) + 0.1, torch.randn(5, 8)
    kept = torch.zeros_like(x).scatter(-1, x.topk(4).indices, 1.0)
    weight, bias = (p.detach() for p in dense.parameters())
    expected = F.linear(x * kept, weight, bias), dy @ weight * kept, dy.T @ (x * kept), dy.sum(0)
    for got, wanted in zip(gradients(sparse, x, dy), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("mode", "n_keep", "block"), [("gradients", 1, 2), ("training", 2, 4)])
def test_update_reads_an_unbiased_pruned_gradient(mode: str, n_keep: int, block: int) -> None:
    """With X = I, dW is the pruned dY itself, transposed."""
    torch.manual_seed(0)
    dense = nn.Linear(8, 8)
    sparse = nmcompile.compile(dense, mode, config=ALL)
    x, dy = torch.eye(8), torch.randn(8, 8)
    drawn = torch.stack([gradients(sparse, x, dy)[2].T for _ in range(900)])
    assert int((drawn != 0).unflatten(1, (-1, block)).sum(2).max()) == n_keep
    error = (drawn.mean(0) - dy).abs()
    assert bool((error <= 5 * drawn.std(0) / 900**0.5 + 1e-6).all())
    torch.testing.assert_close(gradients(sparse, x, dy)[3], dy.sum(0))


@pytest.mark.parametrize("mode", presets)
def test_every_mode_trains(mode: str, net: Net, x: Tensor) -> None:
    sparse = nmcompile.compile(net, mode, calibration=[x] if mode == "inference" else None)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(sparse(x), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", presets)
def test_state_dict_is_the_dense_models(mode: str, net: Net) -> None:
    sparse = nmcompile.compile(net, mode)
    assert list(sparse.state_dict()) == list(net.state_dict())
    sparse.load_state_dict(Net().state_dict(), strict=True)
    Net().load_state_dict(sparse.state_dict(), strict=True)


def test_loading_a_state_dict_rebuilds_the_masks(net: Net, x: Tensor) -> None:
    sparse, other = nmcompile.compile(net), Net()
    sparse(x)
    sparse.load_state_dict(other.state_dict())
    assert torch.equal(sparse(x), nmcompile.compile(other)(x))


def test_loading_a_state_dict_rebuilds_the_masks_of_computed_weights() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(StandardizedConv(4, 8, 1), nn.ReLU()) for _ in range(2)]
    first, second = (nmcompile.compile(model, "weights", config=ALL) for model in models)
    x = torch.randn(2, 4, 3, 3)
    first(x)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("mode", ["weights", "t-weights"])
def test_encoder_layer_prunes_in_inference_too(mode: str) -> None:
    """Eager would run a kernel there that reads the dense weights."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    sparse, x = nmcompile.compile(encoder, mode, config=ALL).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        output = sparse(x)
    torch.testing.assert_close(output, sparse(x))
    torch.testing.assert_close(output, nmcompile.finalize(sparse)(x))


def test_parameters_and_buffers_are_the_same_objects(net: Net) -> None:
    sparse = nmcompile.compile(net)
    tensors = zip([*net.parameters(), *net.buffers()], [*sparse.parameters(), *sparse.buffers()], strict=True)
    assert all(mine is given for mine, given in tensors)


def test_given_modules_stay_plain_unless_inplace(net: Net) -> None:
    sparse = nmcompile.compile(net)
    assert sparse is not net and not any(isinstance(module, ThreeGemm) for module in net.modules())
    assert nmcompile.compile(net, inplace=True) is net
    assert isinstance(net[3], ThreeGemm)


def test_layers_are_also_of_their_own_class(net: Net) -> None:
    sparse = nmcompile.compile(net)
    conv, linear = sparse.get_submodule("3"), sparse.get_submodule("6")
    assert isinstance(sparse, Net)
    assert isinstance(conv, ThreeGemm) and isinstance(conv, nn.Conv2d)
    assert isinstance(linear, ThreeGemm) and isinstance(linear, nn.Linear) and linear.in_features == 32
    assert type(sparse.get_submodule("0")) is nn.Conv2d and type(sparse.get_submodule("8")) is nn.Linear


def test_three_graph_modules(net: Net) -> None:
    layer = nmcompile.compile(net).get_submodule("6")
    assert isinstance(layer, ThreeGemm)
    graphs = {
        Phase.FORWARD: layer.forward_graph,
        Phase.BACKWARD: layer.backward_graph,
        Phase.UPDATE: layer.update_graph,
    }
    for phase, module in graphs.items():
        assert isinstance(module, fx.GraphModule)
        assert [meta_of(node).phase for node in nodes_of_kind(module.graph, "gemm")] == [phase]


def test_optimizer_made_before_trains_the_result(net: Net, x: Tensor) -> None:
    optimizer = torch.optim.Adam(net.parameters())
    before = copy.deepcopy(net.state_dict())
    sparse = nmcompile.compile(net)
    sparse(x).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(before[name], parameter) for name, parameter in sparse.named_parameters())


def test_hooks_added_after_compiling_fire(net: Net, x: Tensor) -> None:
    sparse, fired = nmcompile.compile(net), []
    layer = sparse.get_submodule("3")
    layer.register_forward_pre_hook(lambda *_: fired.append("pre"))
    layer.register_forward_hook(lambda *_: fired.append("forward"))
    layer.register_full_backward_hook(lambda *_: fired.append("backward"))
    sparse(x).sum().backward()
    assert fired == ["pre", "forward", "backward"]


def test_subclass_with_its_own_forward_is_pruned_inside_it() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(StandardizedConv(4, 8, 1), nn.ReLU())
    sparse = nmcompile.compile(dense, "weights", config=ALL)
    layer = sparse.get_submodule("0")
    assert isinstance(layer, StandardizedConv) and isinstance(layer, ThreeGemm)
    x, weight = torch.randn(2, 4, 3, 3), layer.standardized().detach()
    pruned = weight * rowwise(weight[:, :, 0, 0])[:, :, None, None]
    torch.testing.assert_close(sparse(x), F.relu(F.conv2d(x, pruned, layer.bias)))


def test_graph_module_is_compiled_node_by_node(net: Net, x: Tensor) -> None:
    sparse = nmcompile.compile(fx.symbolic_trace(net))
    assert isinstance(sparse, fx.GraphModule)
    assert torch.equal(sparse(x), nmcompile.compile(net)(x))


def test_exported_program_is_compiled_node_by_node(net: Net, x: Tensor) -> None:
    net.eval()
    sparse = nmcompile.compile(torch.export.export(net, (x,)))
    wanted = nmcompile.compile(net)
    assert [layer.status for layer in nmcompile.inspect(sparse).layers] == [
        layer.status for layer in nmcompile.inspect(wanted).layers
    ]
    torch.testing.assert_close(sparse(x), wanted(x))
