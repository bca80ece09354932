"""A frozen linear layer as a function of its input alone: one native call puts it on its grid and multiplies.

The graph of such a layer takes some twenty operators and as many checks, which is ten times the product of a small
layer and one token.
"""

import torch
from torch import Tensor

from nmcompile.backends.cpu.packed_integers import GridInput, GridWeight
from nmcompile.backends.shared.known_choices import is_doubted
from nmcompile.ir.choice import Choice
from nmcompile.ir.choice_slot import ChoiceSlot, settlement
from nmcompile.native import isa_and_threads, kernels

is_deterministic = torch._C._get_deterministic_algorithms


class FrozenLinear:
    """Y = grid(X) Wᵀ + b with a weight, a bias and an input grid that stand still.

    Args:
        packed: packed integers of the weight.
        steps: for each out-feature, the step of the weight times that of the input.
        input: any input on the grid.
        bias: `(out,)`.

    `choices` are those that equal calls have made; a call without one, or with an input that no kernel reads as it is,
    returns None.
    """

    def __init__(self, packed: "kernels.PackedIntegers", steps: Tensor, input: GridInput, bias: Tensor | None) -> None:
        self.packed, self.steps, self.bias = packed, steps.clone(), None if bias is None else bias.detach().clone()
        self.grid = float(input.step), input.grid.low, input.grid.high
        self.in_features, self.out_features = input.values.shape[-1], len(steps)
        self.native = kernels.FrozenLinear(packed, *self.grid, self.steps, self.bias)
        self.choices: dict[tuple[object, ...], Choice] = {}

    def equals(self, other: "FrozenLinear") -> bool:
        """Return whether both compute the same."""
        if self.packed is not other.packed or self.grid != other.grid or not self.steps.equal(other.steps):
            return False
        if self.bias is None or other.bias is None:
            return self.bias is other.bias
        return self.bias.equal(other.bias)

    def fill(self, input: Tensor, output: Tensor) -> bool:
        """Write the result for a contiguous float32 input to a contiguous `output`; return False for a NaN."""
        tokens = output.numel() // self.out_features
        return self.native.run(input.data_ptr(), tokens, output.data_ptr(), *isa_and_threads())

    def note(self, input: Tensor, chosen: Choice, measured: Choice) -> None:
        """Note that integers were chosen for such an input, unless the measurement is doubted."""
        if not is_doubted(measured):
            self.choices[_key(input)] = chosen

    def run(self, input: Tensor, slot: ChoiceSlot) -> Tensor | None:
        """Return `(..., out)` for an input `(..., in)` that is not on its grid yet; None if the graph has to run."""
        shape = input.shape
        if shape[-1] != self.in_features or input.dtype != torch.float32 or not _is_plain(input):
            return None
        choice = self.choices.get(_key(input))
        if choice is None:
            return None
        output = input.new_empty((*shape[:-1], self.out_features))
        slot.latest = choice
        return output if self.fill(input, output) else None


def frozen_linear(weight: GridWeight, input: GridInput, bias: Tensor | None) -> FrozenLinear | None:
    """Return the layer with these operands; None if there is no such kernel, or the weight cannot be packed."""
    operands = weight.weight, weight.step, input.values, input.step, bias
    if any(x is not None and (x.dtype != torch.float32 or not x.is_cpu) for x in operands):
        return None
    # An observer may pass on an input that is not rounded, which must not be rounded here.
    if input.codes() is None:
        return None
    packed = weight.packed() if input.values.shape[-1] == weight.shape[1] else None
    if packed is None or not weight.step.isfinite().all():
        return None
    return FrozenLinear(packed, weight.steps(input), input, bias)


def _is_plain(x: Tensor) -> bool:
    return x.is_cpu and x.is_contiguous() and not x.is_neg()


def _key(input: Tensor) -> tuple[object, ...]:
    """Return everything that decides the kernel for an input of one layer."""
    return input.shape[:-1], torch.get_num_threads(), is_deterministic(), settlement()
