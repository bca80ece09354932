"""The GEMM of a layer gives what PyTorch's layer computes, group by group."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nmcompile.one_shot.matrices as matrices
from nmcompile.ir.layers import ConvLayer, LinearLayer, conv_layer
from nmcompile.one_shot.matrices import as_matrices, from_matrices, input_rows

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
KERNEL, SIZE = (3, 2, 1), (9, 10, 5)


def products(layer: ConvLayer | LinearLayer, weight: Tensor, x: Tensor) -> Tensor:
    """Return X Wᵀ of all groups, `(tokens, out)`."""
    y = input_rows(layer, x) @ as_matrices(layer, weight).mT
    return y.movedim(0, 1).flatten(1)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "geometry",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"padding": "same"}, {"stride": 3, "dilation": 2, "padding": 2}],
)
@pytest.mark.parametrize("slab", [1, 300, 1 << 24])
def test_products_are_the_convolutions(
    dims: int, groups: int, geometry: dict[str, int | str], slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "SLAB", slab)
    weight = torch.randn(8, 8 // groups, *KERNEL[:dims], dtype=torch.float64)
    layer = conv_layer("conv", weight.shape, False, groups=groups, **geometry)  # type: ignore[arg-type]
    x = torch.randn(3, 8, *SIZE[:dims], dtype=torch.float64)
    prepared, _ = layer.prepare(x)
    y = CONVOLVE[dims](prepared, weight, None, layer.stride, layer.padding, layer.dilation, groups)
    torch.testing.assert_close(products(layer, weight, x), y.movedim(1, -1).flatten(0, -2))
    assert torch.equal(from_matrices(layer, as_matrices(layer, weight)), weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)])
def test_products_are_the_linear_layers(transposed: bool, shape: tuple[int, ...]) -> None:
    weight = torch.randn(8, 12, dtype=torch.float64)
    stored = weight.t().contiguous() if transposed else weight
    layer = LinearLayer("linear", tuple(stored.shape), False, transposed=transposed)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(products(layer, stored, x), F.linear(x, weight).reshape(-1, 8))
    assert torch.equal(from_matrices(layer, as_matrices(layer, stored)), stored)


def test_an_unbatched_image_and_padding_that_a_convolution_cannot_do() -> None:
    conv = torch.nn.Conv2d(4, 8, (2, 3), padding="same", padding_mode="circular", bias=False)
    layer = conv_layer("conv", conv.weight.shape, False, padding="same", padding_mode="circular")
    x = torch.randn(4, 6, 5)
    torch.testing.assert_close(products(layer, conv.weight, x), conv(x).movedim(0, -1).flatten(0, -2))


def test_columns_run_over_channels_at_each_kernel_position() -> None:
    layer = conv_layer("conv", (1, 4, 2, 3), False)
    matrix = as_matrices(layer, torch.arange(24.0).reshape(1, 4, 2, 3))
    assert matrix[0, 0, :8].tolist() == [0, 6, 12, 18, 1, 7, 13, 19]


def test_slabs_are_bounded() -> None:
    layer = conv_layer("conv", (4, 8, 3, 3), False, padding=1)
    x = torch.randn(2, 8, 64, 4)
    whole = input_rows(layer, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices, "SLAB", 10 * 4 * 72)  # ten lines of one sample
        slabs = list(matrices.input_slabs(layer, x))
        assert max(slab.numel() for slab in slabs) <= matrices.SLAB
    assert torch.equal(torch.cat(slabs, dim=1), whole)
