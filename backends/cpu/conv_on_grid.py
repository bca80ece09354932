"""The forward GEMM of a convolution with a weight on a 4-bit grid, by its packed integers or by its values."""

from dataclasses import dataclass

from torch import Tensor

from nmcompile.backends.cpu.conv import (
    Ints,
    choose_forward,
    dense_forward,
    empty_output,
    matrix,
    positions_of,
    result_shape,
)
from nmcompile.backends.cpu.convolved_integers import ConvGridWeight, FrozenConv, frozen_conv
from nmcompile.backends.cpu.frozen_layer import FrozenLayer
from nmcompile.backends.cpu.gemm import Geometry
from nmcompile.backends.cpu.on_grid import GemmOnGrid
from nmcompile.backends.cpu.packed_integers import GridInput
from nmcompile.custom_op import ANY_STRIDES, custom_op
from nmcompile.ir.choice import Choice
from nmcompile.quantization import Grid
from nmcompile.spare_memory import empty


def _dense_forward(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    input_step: Tensor,
    bias: Tensor | None,
    bits: int,
    input_bits: int,
    input_signed: bool,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    slot: str,
) -> Tensor:
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    values = ConvGridWeight(weight, mask, step, bits, geometry).values()
    return dense_forward(input, values, None, bias, *geometry)


@custom_op("nmcompile::cpu_conv_forward_on_grid", tags=ANY_STRIDES, fake=empty_output, settled=_dense_forward)
def conv_forward_on_grid(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    input_step: Tensor,
    bias: Tensor | None,
    bits: int,
    input_bits: int,
    input_signed: bool,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    slot: str,
) -> Tensor:
    """Compute Y = X * W + b, `(N, C, *spatial)`, with W masked along in-channels and put on its signed grid.

    X is already on the grid of `input_step`. The result is channels last if X or W is.
    """
    x = GridInput(input, input_step, Grid(input_bits, input_signed))
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    return ConvOnGrid(x, ConvGridWeight(weight, mask, step, bits, geometry), bias, geometry).run(slot)


@dataclass(frozen=True)
class ConvOnGrid(GemmOnGrid):
    """The forward GEMM of a convolution of one or two spatial dims."""

    weight: ConvGridWeight

    @property
    def shape(self) -> Tensor:
        """Return a meta tensor with the sizes and strides of the result."""
        return result_shape(self.input.values, self.weight.weight, self.geometry)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return *matrix(self.weight.weight, self.geometry.groups), positions_of(self.shape)

    def empty(self) -> Tensor:
        return empty(self.input.values, self.shape)

    def on_values(self) -> tuple[Tensor, Choice]:
        return choose_forward(self.input.values, self.weight.values(), None, self.bias, self.geometry)

    def on_integers(self, output: Tensor, frozen: FrozenLayer | None) -> bool:
        # The frozen layer would round the input again, which an observer may have left as it is.
        return self.weight.convolve(self.input, self.bias, output)

    def frozen(self, prunes: bool) -> FrozenConv | None:
        return frozen_conv(self.weight, self.input, self.bias, prunes)
