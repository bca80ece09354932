"""A frozen linear layer in one native call."""

from torch import Tensor

from nmcompile.backends.cpu.frozen_layer import FrozenLayer, are_plain
from nmcompile.backends.cpu.packed_integers import GridInput, LinearGridWeight
from nmcompile.native import isa_and_threads, kernels


class FrozenLinear(FrozenLayer):
    """Y = grid(X) Wᵀ + b, `(..., in)` to `(..., out)`."""

    def __init__(self, packed: "kernels.PackedIntegers", steps: Tensor, input: GridInput, bias: Tensor | None) -> None:
        super().__init__(packed, steps, input, bias)
        self.in_features, self.out_features = input.values.shape[-1], len(steps)
        self.native = kernels.FrozenLinear(packed, *self.grid, self.steps, self.bias)

    def empty(self, input: Tensor) -> Tensor:
        return input.new_empty((*input.shape[:-1], self.out_features))

    def fill(self, input: Tensor, output: Tensor) -> bool:
        tokens, input = output.numel() // self.out_features, input.contiguous()
        return self.native.run(input.data_ptr(), tokens, output.data_ptr(), *isa_and_threads())


def frozen_linear(weight: LinearGridWeight, input: GridInput, bias: Tensor | None) -> FrozenLinear | None:
    """Return the layer with these operands; None if there is no such kernel, or the weight cannot be packed."""
    # An observer may pass on an input that is not rounded, which must not be rounded here.
    if not are_plain(weight, input, bias) or input.codes() is None:
        return None
    packed = weight.packed() if input.values.shape[-1] == weight.shape[1] else None
    return None if packed is None else FrozenLinear(packed, weight.steps(input), input, bias)
