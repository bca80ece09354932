"""The plan: for every layer and phase, which operand is pruned how, and why not where it is not."""

from collections.abc import Iterator
from dataclasses import dataclass

from nmcompile.config import Phase
from nmcompile.ir.layers import Layer
from nmcompile.pruning.pattern import NMPattern


@dataclass(frozen=True)
class PlanRow:
    """One pruned operand of one GEMM, or the reason why that GEMM runs dense (`operand` is then None).

    `axis` says along what the blocks run: `in` or `out` (channels or features), `batch`, `flat` or `auto`.
    """

    layer: str
    phase: Phase
    operand: str | None = None
    operator: str | None = None
    pattern: NMPattern | None = None
    axis: str | None = None
    reason: str = ""

    @property
    def is_sparse(self) -> bool:
        return self.operand is not None

    def __str__(self) -> str:
        if not self.is_sparse:
            return "dense"
        return f"{self.operand} {self.pattern} {self.operator} along {self.axis}"


@dataclass(frozen=True)
class LayerPlan:
    """One layer and its rows, at least one for each phase.

    `rewritten` is False where the layer stays the module that it was.
    """

    layer: Layer
    rows: tuple[PlanRow, ...]
    rewritten: bool

    def rows_of(self, phase: Phase) -> tuple[PlanRow, ...]:
        return tuple(row for row in self.rows if row.phase is phase)

    def find(self, phase: Phase, operand: str) -> PlanRow | None:
        """The row that prunes `operand` (`weight`, `input`, `grad_output`) in a phase, if there is one."""
        return next((row for row in self.rows_of(phase) if row.operand == operand), None)


@dataclass(frozen=True)
class Plan:
    """All layers of a model in call order where it is known, else in `named_modules` order."""

    layers: tuple[LayerPlan, ...]

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def names(self) -> tuple[str, ...]:
        return tuple(plan.layer.name for plan in self.layers)
