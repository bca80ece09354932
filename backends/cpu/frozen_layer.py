"""A frozen layer as a function of its input alone: one native call puts it on its grid and multiplies.

The graph of such a layer takes some twenty operators and as many checks, which is ten times the product of a small
layer and one token.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from nmcompile.backends.cpu.packed_integers import GridInput, GridWeight
from nmcompile.backends.shared.known_choices import is_doubted
from nmcompile.backends.shared.recent import Recent
from nmcompile.ir.choice import Choice
from nmcompile.ir.choice_slot import ChoiceSlot, settlement

SHAPES = 1024  # of inputs whose choices a layer keeps, about a kilobyte each

is_deterministic = torch._C._get_deterministic_algorithms


class FrozenLayer(ABC):
    """A layer's result for an input that is not on its grid yet; weight, bias and that grid stand still.

    Args:
        packed: packed integers of the weight.
        steps: for each out-feature, the step of the weight times that of the input.
        input: any input on the grid.
        bias: `(out,)`.

    `choices` are those that equal calls have made; a call without one returns None.
    """

    def __init__(self, packed: object, steps: Tensor, input: GridInput, bias: Tensor | None) -> None:
        self.packed, self.steps, self.bias = packed, steps.clone(), None if bias is None else bias.detach().clone()
        self.grid = float(input.step), input.grid.low, input.grid.high
        self.choices: Recent[tuple[object, ...], Choice] = Recent(SHAPES)

    def equals(self, other: "FrozenLayer") -> bool:
        """Return whether both compute the same."""
        if self.packed is not other.packed or self.grid != other.grid or not self.steps.equal(other.steps):
            return False
        if self.bias is None or other.bias is None:
            return self.bias is other.bias
        return self.bias.equal(other.bias)

    @abstractmethod
    def empty(self, input: Tensor) -> Tensor:
        """Return a tensor for the result."""

    @abstractmethod
    def fill(self, input: Tensor, output: Tensor) -> bool:
        """Write the result for a float32 input on the CPU to such a tensor; return False for a NaN."""

    def note(self, input: Tensor, chosen: Choice, measured: Choice) -> None:
        """Note that integers were chosen for such an input, unless the measurement is doubted."""
        if not is_doubted(measured):
            self.choices.put(_key(input), chosen)

    def run(self, input: Tensor, slot: ChoiceSlot) -> Tensor | None:
        """Return the result for an input that is not on its grid yet; None if the graph has to run."""
        is_plain = input.dtype == torch.float32 and input.is_cpu and not input.is_neg()
        choice = self.choices.get(_key(input)) if is_plain else None
        if choice is None:
            return None
        output = self.empty(input)
        slot.latest = choice
        return output if self.fill(input, output) else None


def are_plain(weight: GridWeight[Any], input: GridInput, bias: Tensor | None) -> bool:
    """Return whether the operands are float32 on the CPU, and the weight's steps are numbers."""
    operands = weight.weight, weight.step, input.values, input.step, bias
    if any(x is not None and (x.dtype != torch.float32 or not x.is_cpu) for x in operands):
        return False
    return bool(weight.step.isfinite().all())


def _key(input: Tensor) -> tuple[object, ...]:
    """Return everything that decides the kernel for an input of one layer, and the strides of its result."""
    return input.shape, input.stride(), torch.get_num_threads(), is_deterministic(), settlement()
