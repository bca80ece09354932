"""One call of a GEMM: the operands of its kernels and the size of the product."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from nmcompile.backends.cpu.cost import predicted_speedup
from nmcompile.backends.cpu.gemm import Geometry
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.packed_weights import forget_packs
from nmcompile.backends.shared.choose_kernel import SMALL, UNFIT, run_best
from nmcompile.backends.shared.known_choices import is_doubted
from nmcompile.ir import choice_slot
from nmcompile.ir.choice import Choice

AT_REST = "forward at rest"
ON_GRID = "forward at rest on a grid"
FROZEN_ON_GRID = "forward frozen on a grid"
DTYPES = torch.float32, torch.bfloat16


def keep(slot: str, outcome: tuple[Tensor, Choice]) -> Tensor:
    """Keep a choice in the slot of that name, settled if it is dense and nothing can change it; return the result."""
    choice = outcome[1]
    is_settled = choice.kernel == "dense" and choice is not UNFIT and not is_doubted(choice)
    return choice_slot.keep(slot, outcome, is_settled)


class GemmCall(NamedTuple):
    """Arguments of a GEMM.

    Args:
        phase: `"forward"`, `AT_REST` (with a weight that stays packed), `ON_GRID` (the same, packed as integers),
            `FROZEN_ON_GRID` (the same in one native call), `"backward"` or `"update"`; it includes the pruning that a
            kernel does itself.
        geometry: the layer's geometry.
        operands: the operands of the kernels.
        rows, depth, lanes: sizes of one group's product (see `nmcompile.backends.cpu.contraction`).
    """

    phase: str
    geometry: Geometry
    operands: tuple[Tensor | None, ...]
    rows: int
    depth: int
    lanes: int

    def run(
        self, empty: Callable[[], Tensor], fill: Callable[[Tensor], bool], dense: Callable[[], Tensor]
    ) -> tuple[Tensor, Choice]:
        """Return the product by the kernel that pays, and the choice of that kernel.

        Args:
            empty: returns a tensor for the result.
            fill: writes the result with the sparse kernel; False if the operand is not 2:4, or an operand not finite.
            dense: returns the result of the dense kernel.
        """
        refusal = self._refusal()
        if refusal:
            return dense(), Choice("dense", refusal)

        def sparse() -> Tensor | None:
            output = empty()
            return output if fill(output) else None

        result, choice = run_best(self._problem, self._multiplications(), self._predicted, sparse, dense)
        if self.phase == AT_REST and choice.kernel == "dense":
            forget_packs(self.operands[1])
        return result, choice

    def _refusal(self) -> str:
        """Return why there is no sparse kernel for these operands; empty if there is one."""
        if not self._are_taken():
            kinds = {f"{x.dtype} on {x.device.type}" for x in self.operands if x is not None and x.dtype != torch.bool}
            found = ", ".join(sorted(kinds))
            return f"no sparse kernel for {found}, only for operands of one type, float32 or bfloat16, on cpu"
        support = kernel_support()
        return "" if support.ok else support.reason

    def _are_taken(self) -> bool:
        """Return whether the operands are on the CPU and have one type that the kernels take."""
        first = self.operands[0]
        dtype = None if first is None else first.dtype
        for x in self.operands:  # a loop, as each call of a small layer comes here
            if x is not None and not (x.is_cpu and (x.dtype == dtype or x.dtype == torch.bool)):
                return False
        return dtype in (DTYPES[:1] if self.phase in (ON_GRID, FROZEN_ON_GRID) else DTYPES)

    def _problem(self) -> Hashable:
        """Return everything that decides the time of the kernels."""
        layouts = tuple([None if x is None else (x.dtype, tuple(x.shape), x.stride()) for x in self.operands])
        return self.phase, self.geometry, layouts, torch.get_num_threads()

    def _multiplications(self) -> int:
        """Return the multiplications of the dense product; of one on a grid, as many as are worth a measurement."""
        product = self.rows * self.depth * self.lanes * self.geometry.groups
        # A call with integers takes less than the overhead for which small products run dense.
        return max(product, SMALL) if self.phase in (ON_GRID, FROZEN_ON_GRID) else product

    def _predicted(self) -> float | None:
        """Return the predicted speed-up; None for integers and bfloat16, which the cost model does not cover."""
        first = self.operands[0]
        if self.phase in (ON_GRID, FROZEN_ON_GRID) or (first is not None and first.dtype != torch.float32):
            return None
        threads = torch.get_num_threads()
        return predicted_speedup(self.rows, self.depth, self.lanes, self.geometry.is_linear, threads)
