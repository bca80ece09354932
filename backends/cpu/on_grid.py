"""A forward GEMM whose input and weight are on grids of at most four bits, by their integers or by their values."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nmcompile.backends.cpu.frozen_layer import FrozenLayer
from nmcompile.backends.cpu.gemm import Geometry
from nmcompile.backends.cpu.gemm_call import FROZEN_ON_GRID, ON_GRID, GemmCall
from nmcompile.backends.cpu.gemm_call import keep as keep_settled
from nmcompile.backends.cpu.packed_integers import GridInput, GridWeight
from nmcompile.ir.choice import Choice
from nmcompile.ir.choice_slot import ChoiceSlot, find_slot, keep
from nmcompile.weight_cache import FROZEN, are_weights_at_rest, content_at_rest


@dataclass(frozen=True)
class GemmOnGrid(ABC):
    """The operands of the GEMM, and its kernels.

    Args:
        input: already on its grid.
        weight: masked and put on its grid when it is read.
        bias: `(out,)`.
        geometry: the layer's geometry.
    """

    input: GridInput
    weight: GridWeight[Any]
    bias: Tensor | None
    geometry: Geometry

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, int, int]:
        """Return rows, depth and lanes of one group's product."""

    @abstractmethod
    def empty(self) -> Tensor:
        """Return a tensor for the result."""

    @abstractmethod
    def on_values(self) -> tuple[Tensor, Choice]:
        """Return the result of the kernels for values, and the choice between them."""

    @abstractmethod
    def on_integers(self, output: Tensor, frozen: FrozenLayer | None) -> bool:
        """Write the result of the kernel for integers; return False if an operand has no such integers.

        `frozen` is the layer with these operands, if they stand still.
        """

    @abstractmethod
    def frozen(self, prunes: bool) -> FrozenLayer | None:
        """Return the layer as a function of its input, which it prunes or not; None if there is no such kernel."""

    def run(self, slot: str) -> Tensor:
        """Return the result, by integers if they pay and the weight can stay packed."""
        # A view (a part of attention's weight) lives for one call only, so nothing of it can be cached.
        if not are_weights_at_rest() or self.weight.weight._is_view():
            return keep_settled(slot, self.on_values())
        return keep(slot, self._choose(self._frozen(find_slot(slot))))

    def _frozen(self, slot: ChoiceSlot | None) -> FrozenLayer | None:
        """Return the layer as the slot holds it for later calls; None if its weight is not frozen."""
        if slot is None:
            return None
        made = self.frozen(slot.prunes) if content_at_rest() == FROZEN else None
        if made is not None and isinstance(slot.ready, FrozenLayer) and slot.ready.equals(made):
            return slot.ready
        slot.ready = made
        return made

    def _choose(self, frozen: FrozenLayer | None) -> tuple[Tensor, Choice]:
        """Choose between integers and values, and between the kernels for values; report both choices as one."""
        input, weight, on_values = self.input.values, self.weight, list[Choice]()

        def from_values() -> Tensor:
            result, choice = self.on_values()
            on_values[:] = [choice]
            return result

        operands = input, weight.weight, weight.mask, weight.step, self.input.step, self.bias
        phase = ON_GRID if frozen is None else FROZEN_ON_GRID
        gemm = GemmCall(phase, self.geometry, operands, *self.sizes)
        output, choice = gemm.run(self.empty, lambda output: self.on_integers(output, frozen), from_values)
        if choice.kernel == "sparse":
            weight.forget_values()
            chosen = Choice("integers", choice.reason, None, choice.dense_seconds, None, choice.sparse_seconds)
            if frozen is not None:
                frozen.note(input, chosen, choice)
            return output, chosen
        return output, replace(on_values[0], integers_seconds=choice.sparse_seconds)
