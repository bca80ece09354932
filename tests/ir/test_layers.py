"""The geometry of layers, compared with that of PyTorch's own modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nmcompile.capture import capture_model
from nmcompile.errors import OperandError
from nmcompile.ir.layers import ConvLayer, Layer, LinearLayer, conv_layer
from nmcompile.pruning import NMPattern

CONVS: dict[str, nn.Conv1d | nn.Conv2d | nn.Conv3d] = {
    "plain": nn.Conv2d(4, 8, 3),
    "stride and dilation": nn.Conv2d(4, 8, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 0)),
    "groups": nn.Conv1d(8, 12, 3, groups=4, padding=2),
    "valid": nn.Conv1d(4, 8, 3, padding="valid"),
    "same": nn.Conv2d(4, 8, 3, padding="same", dilation=2),
    "same, even kernel": nn.Conv2d(4, 8, (4, 3), padding="same"),
    "same, 3d": nn.Conv3d(2, 4, (2, 3, 1), padding="same"),
    "reflect": nn.Conv1d(4, 8, 3, padding=2, padding_mode="reflect"),
    "replicate": nn.Conv2d(4, 8, 3, padding=(2, 1), padding_mode="replicate"),
    "circular": nn.Conv3d(2, 4, 3, padding=(1, 0, 2), padding_mode="circular"),
    "same, circular, even kernel": nn.Conv2d(4, 8, 2, padding="same", padding_mode="circular"),
}
LAYERS: dict[str, nn.Module] = {"linear": nn.Linear(6, 10), **CONVS}


def layer_of(module: nn.Module) -> Layer:
    return capture_model(nn.Sequential(module)).sites[0].layer


def input_of(module: nn.Module, batch: int = 3) -> Tensor:
    if isinstance(module, nn.Linear):
        return torch.randn(batch, 5, module.in_features)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return torch.randn(batch, module.in_channels, *(7, 6, 5)[: len(module.kernel_size)])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("batched", [True, False])
def test_geometry_is_what_the_module_computes(name: str, batched: bool) -> None:
    conv = CONVS[name]
    layer = layer_of(conv)
    assert isinstance(layer, ConvLayer)
    x = input_of(conv) if batched else input_of(conv)[0]
    prepared, unbatched = layer.prepare(x)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[layer.spatial_dims]
    y = convolve(prepared, conv.weight, conv.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert unbatched == (not batched)
    assert torch.equal(y if batched else y.squeeze(0), conv(x))


@pytest.mark.parametrize("name", ["plain", "groups", "same, 3d", "reflect"])
@pytest.mark.parametrize("extra", [-2, 1])
def test_a_rank_that_no_convolution_takes_is_an_error(name: str, extra: int) -> None:
    layer = layer_of(CONVS[name])
    assert isinstance(layer, ConvLayer)
    x = torch.zeros([4] * (layer.spatial_dims + 2 + extra))
    with pytest.raises(OperandError, match=r"layer '0'.*shape \(4.*takes \(batch, channels, .*(width|length)"):
        layer.prepare(x)


def test_a_single_token_gets_a_batch_dim() -> None:
    prepared, unbatched = LinearLayer("fc", (4, 6), True).prepare(torch.ones(6))
    assert prepared.shape == (1, 6) and unbatched
    assert not LinearLayer("fc", (4, 6), True).prepare(torch.ones(1, 6))[1]


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_times_positions_are_the_multiplications_that_pytorch_counts(name: str) -> None:
    module = LAYERS[name]
    x = input_of(module)
    captured = capture_model(nn.Sequential(module), (x,))
    with FlopCounterMode(display=False) as counter:
        module(x)
    positions = captured.facts["0"].positions
    assert positions is not None
    assert 2 * captured.sites[0].layer.parameters * positions == counter.get_total_flops()


@pytest.mark.parametrize(
    ("layer", "kind", "out_features", "in_features", "channel_dim"),
    [
        (LinearLayer("a", (4, 6), True), "linear", 4, 6, -1),
        (LinearLayer("a", (4, 6), True, transposed=True), "linear", 6, 4, -1),
        (conv_layer("a", (8, 4, 3), False), "conv1d", 8, 4, 1),
        (conv_layer("a", (8, 2, 3, 3), False, groups=4), "conv2d", 8, 2, 1),
        (conv_layer("a", (8, 4, 3, 3, 3), False), "conv3d", 8, 4, 1),
    ],
    ids=["linear", "transposed", "conv1d", "grouped", "conv3d"],
)
def test_features(layer: Layer, kind: str, out_features: int, in_features: int, channel_dim: int) -> None:
    assert (layer.kind, layer.out_features, layer.in_features) == (kind, out_features, in_features)
    assert layer.weight_shape[layer.out_dim] == out_features and layer.weight_shape[layer.in_dim] == in_features
    assert layer.channel_dim == channel_dim


@pytest.mark.parametrize("pattern", [NMPattern(1, 2), NMPattern(2, 4), NMPattern(4, 8)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_blocks_fit_where_they_cut_each_group_without_a_rest(pattern: NMPattern, groups: int) -> None:
    for out_channels in range(groups, 33, groups):
        for in_channels in range(groups, 33, groups):
            layer = conv_layer("a", (out_channels, in_channels // groups, 1), False, groups=groups)
            cuts = set(range(0, max(out_channels, in_channels) + 1, pattern.block))
            per_group = in_channels // groups, out_channels // groups
            assert (layer.fits_forward(pattern), layer.fits_backward(pattern)) == tuple(n in cuts for n in per_group)


@pytest.mark.parametrize(("groups", "channels", "is_depthwise"), [(1, 1, False), (4, 4, True), (2, 4, False)])
def test_depthwise(groups: int, channels: int, is_depthwise: bool) -> None:
    assert layer_of(nn.Conv2d(channels, 8, 3, groups=groups)).is_depthwise == is_depthwise


def test_conv_arguments_in_every_spelling() -> None:
    one = conv_layer("a", (8, 4, 3, 3), True, stride=2, padding=1, dilation=1)
    assert one == conv_layer("a", (8, 4, 3, 3), True, stride=[2], padding=(1, 1), dilation=[1, 1])
    assert (one.stride, one.padding, one.dilation, one.pad_before) == ((2, 2), (1, 1), (1, 1), ())
