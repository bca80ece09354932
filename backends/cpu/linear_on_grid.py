"""The forward GEMM of a linear layer with a weight on a 4-bit grid, by its packed integers or by its values.

With few tokens, most of the time goes into reading the weight, and packed integers are a tenth of the values' bytes.
With many tokens, an instruction multiplies more integers than values.
"""

from dataclasses import dataclass

from torch import Tensor

from nmcompile.backends.cpu.frozen_layer import FrozenLayer
from nmcompile.backends.cpu.frozen_linear import FrozenLinear, frozen_linear
from nmcompile.backends.cpu.linear import GEOMETRY, choose_forward, dense_forward, empty_output
from nmcompile.backends.cpu.on_grid import GemmOnGrid
from nmcompile.backends.cpu.packed_integers import GridInput, LinearGridWeight
from nmcompile.custom_op import custom_op
from nmcompile.ir.choice import Choice
from nmcompile.quantization import Grid


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
    transposed: bool,
    slot: str,
) -> Tensor:
    values = LinearGridWeight(weight, mask, step, bits, transposed).values()
    return dense_forward(input, values, None, bias, transposed)


@custom_op("nmcompile::cpu_linear_forward_on_grid", fake=empty_output, settled=_dense_forward)
def linear_forward_on_grid(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    input_step: Tensor,
    bias: Tensor | None,
    bits: int,
    input_bits: int,
    input_signed: bool,
    transposed: bool,
    slot: str,
) -> Tensor:
    """Compute Y = X Wᵀ + b, `(..., in)` to `(..., out)`, with W masked along in-features and put on its signed grid.

    X is already on the grid of `input_step`.
    """
    x = GridInput(input, input_step, Grid(input_bits, input_signed))
    return LinearOnGrid(x, LinearGridWeight(weight, mask, step, bits, transposed), bias, GEOMETRY).run(slot)


@dataclass(frozen=True)
class LinearOnGrid(GemmOnGrid):
    """The forward GEMM of a linear layer."""

    weight: LinearGridWeight

    @property
    def sizes(self) -> tuple[int, int, int]:
        return *self.weight.shape, self.input.values.shape[:-1].numel()

    def empty(self) -> Tensor:
        input = self.input.values
        return input.new_empty(*input.shape[:-1], self.weight.out_features)

    def on_values(self) -> tuple[Tensor, Choice]:
        return choose_forward(self.input.values, self.weight.values(), None, self.bias, self.weight.transposed)

    def on_integers(self, output: Tensor, frozen: FrozenLayer | None) -> bool:
        if frozen is not None:
            return frozen.fill(self.input.values, output)
        return self.weight.multiply(self.input, self.bias, output)

    def frozen(self, prunes: bool) -> FrozenLinear | None:
        return None if prunes else frozen_linear(self.weight, self.input, self.bias)
