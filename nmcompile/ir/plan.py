"""The plan: for every layer and phase, which operand is pruned or quantized and how, or else why not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from nmcompile.config import Phase
from nmcompile.ir.layers import Layer
from nmcompile.layer_config import TRANSPOSABLE
from nmcompile.printable import printable
from nmcompile.pruning.pattern import NMPattern
from nmcompile.quantization import Grid

Operand = Literal["weight", "input", "grad_output", "output"]
READ: tuple[Operand, ...] = ("weight", "input", "grad_output")
"""Operands that a GEMM reads."""

EIGHT = 8
"""Bits of operands that are quantized and not pruned: they need no learned clip, but a step for each out-channel."""

Axis = Literal["in", "out", "batch", "flat", "auto"]
"""Axis along which blocks run: channels or features (in, out), the batch, or the flattened tokens or positions."""


@dataclass(frozen=True)
class PlanRow:
    """One operator on one operand of a GEMM, or the reason why that GEMM runs dense (`operand` is then None).

    A pruning row has a `pattern` and an `axis`. A quantization row has a `grid`, and an `axis` if every channel along
    it has a step of its own. `stream` is the layers whose results share one step, so that they add up in integers.
    """

    layer: str
    phase: Phase
    operand: Operand | None = None
    operator: str | None = None
    pattern: NMPattern | None = None
    axis: Axis | None = None
    grid: Grid | None = None
    reason: str = ""
    stream: tuple[str, ...] = ()

    @property
    def is_sparse(self) -> bool:
        return self.pattern is not None

    @property
    def is_quantized(self) -> bool:
        return self.grid is not None

    @property
    def is_transposable(self) -> bool:
        """Return whether the row's mask is N:M along both axes of the weight."""
        return self.operator in TRANSPOSABLE

    def __str__(self) -> str:
        if self.operand is None:
            return "dense"
        if self.grid is not None:
            return f"{self.operand} {self.grid} {self.operator}"
        return f"{self.operand} {self.pattern} {self.operator} along {self.axis}"


@dataclass(frozen=True)
class LayerPlan:
    """One layer and its rows, at least one for each phase.

    `rewritten` is False if the layer's module stays unchanged. `norm` is the batch norm after it that export absorbs,
    and after which its output is quantized; `""` if there is none. `rounds_bias` says whether the bias is added in
    whole steps of the integer accumulator.
    """

    layer: Layer
    rows: tuple[PlanRow, ...]
    rewritten: bool
    norm: str = ""
    rounds_bias: bool = False

    def rows_of(self, phase: Phase) -> tuple[PlanRow, ...]:
        return tuple(row for row in self.rows if row.phase is phase)

    def is_pruned(self, phase: Phase) -> bool:
        """Return whether the GEMM of a phase reads a pruned operand."""
        return any(row.is_sparse and row.operand in READ for row in self.rows_of(phase))

    def find(self, phase: Phase, operand: Operand) -> PlanRow | None:
        """Return the row that prunes `operand` (`weight`, `input`, `grad_output`) in a phase, if there is one."""
        return next((row for row in self.rows_of(phase) if row.operand == operand and row.is_sparse), None)

    def grid_row(self, operand: Operand) -> PlanRow | None:
        """Return the row that quantizes `weight` or `input` in the forward GEMM, if there is one."""
        rows = self.rows_of(Phase.FORWARD)
        return next((row for row in rows if row.operand == operand and row.is_quantized), None)

    def parts(self) -> tuple[tuple[Phase, ...], ...]:
        """Return the phases that prune, grouped if they can only be pruned together.

        A mask acts on the forward and on the backward GEMM, a pruned input on all three.
        """
        if self.find(Phase.FORWARD, "input"):
            return (tuple(Phase),)
        weight = (Phase.FORWARD, Phase.BACKWARD) if self.find(Phase.FORWARD, "weight") else ()
        gradients = [(p,) for p in (Phase.BACKWARD, Phase.UPDATE) if self.find(p, "grad_output") and p not in weight]
        return ((weight,) if weight else ()) + tuple(gradients)

    def without(self, reasons: Mapping[Phase, str]) -> "LayerPlan":
        """Return the plan that prunes nothing in these phases, for these reasons; grids and pruned outputs stay."""
        kept = [r for r in self.rows if r.phase not in reasons or r.is_quantized or r.operand == "output"]
        dense = [PlanRow(self.layer.name, phase, reason=reason) for phase, reason in reasons.items()]
        rows = (*kept, *dense)
        return replace(self, rows=rows, rewritten=any(row.is_sparse or row.is_quantized for row in rows))


@dataclass(frozen=True)
class Plan:
    """All layers of a model, in call order if it is known, else in `named_modules` order."""

    layers: tuple[LayerPlan, ...]

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def without(self, dense: "DensePhases") -> "Plan":
        """Return the plan that prunes nothing in some phases of some layers."""
        return Plan(tuple(p.without(dense[p.layer.name]) if dense.get(p.layer.name) else p for p in self.layers))

    def names(self) -> tuple[str, ...]:
        return tuple(plan.layer.name for plan in self.layers)


DensePhases = Mapping[str, Mapping[Phase, str]]
"""Phases by layer name that are left dense because pruning them does not pay, with the reason."""


@dataclass(frozen=True)
class Reverted:
    """Layers that were left dense for accuracy, and the scores that decided."""

    layers: tuple[str, ...]
    dense: float
    compiled: float

    def __str__(self) -> str:
        names = ", ".join(map(printable, self.layers)) or "none"
        return f"reverted for accuracy: {names} (score {self.compiled:.4f}, dense {self.dense:.4f})"
