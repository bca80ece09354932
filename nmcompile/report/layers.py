"""The part of a report about one layer: its plan, its graphs, and the observations of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from nmcompile.config import Phase
from nmcompile.ir.choice import Choice
from nmcompile.ir.found_mask import FoundMask
from nmcompile.ir.layer_sample import LayerSample
from nmcompile.ir.layers import Layer
from nmcompile.ir.node_meta import Refusal
from nmcompile.ir.plan import READ, LayerPlan, Operand
from nmcompile.ir.program import Program, ThreeGraphs
from nmcompile.report.graphs import format_three_graphs

BITS = 32
OPERANDS: dict[Operand, str] = {"weight": "W", "input": "X", "output": "Y", "grad_output": "dY"}


@dataclass(frozen=True)
class Observation:
    """Observations of one layer: whether it was called, its output positions, its kernels, the origin of its mask.

    `permutation` says what another order of its channels won, or why they keep theirs. `sample` holds the figures of a
    step with real data, if one was made.
    """

    called: bool
    positions: int | None
    kernels: Mapping[Phase, str] = field(default_factory=dict)
    choices: Mapping[Phase, Choice] = field(default_factory=dict)
    found: FoundMask | None = None
    permutation: str = ""
    sample: LayerSample | None = None


class PrintableGraphs:
    """The three graphs of a layer by phase; `str()` prints them with one node per line."""

    def __init__(self, graphs: ThreeGraphs) -> None:
        self.three = graphs

    def __getitem__(self, phase: Phase) -> fx.GraphModule:
        return self.three[phase]

    def __str__(self) -> str:
        return format_three_graphs(self.three)


@dataclass(frozen=True)
class LayerReport:
    """Report of one layer.

    `macs` is for one of its three GEMMs (all take the same), None if no shape is known. `refusals` are the backends
    that were asked before the one which took a node, with their reasons. `found` is the origin of a mask that was found
    from calibration data, None for others. `permutation` says what another order of its channels won. `sample` holds
    the figures of a step with real data, None without one.
    """

    plan: LayerPlan
    graphs: PrintableGraphs
    status: str
    positions: int | None
    kernels: Mapping[Phase, str]
    choices: Mapping[Phase, Choice]
    refusals: Mapping[Phase, tuple[Refusal, ...]]
    found: FoundMask | None
    permutation: str
    sample: LayerSample | None = None

    @property
    def layer(self) -> Layer:
        return self.plan.layer

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def macs(self) -> int | None:
        return None if self.positions is None else self.positions * self.layer.multiplied

    def density(self, phase: Phase) -> float:
        """Return the expected share of the dense MACs: the product of the operands' densities (Equation 26)."""
        rows = self.plan.rows_of(phase) if self.status == "sparse" else ()
        return math.prod(row.pattern.density for row in rows if row.pattern is not None and row.operand in READ)

    def bit_products(self, phase: Phase) -> int:
        """Return the bits of one operand times the bits of the other: the cost of a MAC in BOPs."""
        rows = self.plan.rows_of(phase) if self.status == "sparse" else ()
        grids = [row.grid for row in rows if row.grid is not None and row.operand in READ]
        return int(math.prod(grid.bits for grid in grids) * BITS ** (2 - len(grids)))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Return why phases are dense, or sparse where the default rules would leave them dense; each reason once."""
        return tuple(dict.fromkeys(row.reason for row in self.plan.rows if row.reason))

    @property
    def note(self) -> str:
        """Return the status if it is unusual, and the reasons."""
        if self.status not in ("sparse", "dense"):
            # The reason why a layer is pruned against the default rules holds whether or not it ran.
            return "; ".join((self.status, *(row.reason for row in self.plan.rows if row.is_sparse and row.reason)))
        absorbed = (f"absorbs {self.plan.norm!r} in eval()",) if self.plan.norm else ()
        found = () if self.found is None else (str(self.found),)
        permuted = (self.permutation,) if self.permutation else ()
        return "; ".join((*found, *permuted, *self.reasons, *absorbed))

    def operands(self, phase: Phase) -> str:
        """Say in short what is pruned and quantized in a phase: `"W 2:4 greedy, X u4 mse"`, or `"dense"`."""
        cells: dict[Operand, str] = {}
        for row in self.plan.rows_of(phase):
            if row.operand is not None:
                cell = cells.get(row.operand, OPERANDS[row.operand])
                cells[row.operand] = f"{cell} {row.pattern or row.grid} {row.operator}"
        return ", ".join(cells.values()) or "dense"


def layer_report(program: Program, plan: LayerPlan, seen: Observation, unseen: str) -> LayerReport:
    """Report on one layer of a program.

    Args:
        program: the layer's program.
        plan: the layer's plan.
        seen: the layer's observation.
        unseen: the status of a layer that should have been called and was not; empty if nothing ran.
    """
    graphs = program.layers[plan.layer.name]
    in_gemm = (row for row in plan.rows if row.operand in READ)
    status = "sparse" if any(row.is_sparse or row.is_quantized for row in in_gemm) else "dense"
    if plan.rewritten and not seen.called:
        status = unseen or status
    # The example's positions are known for all layers alike; those of a run only for layers that were rewritten.
    example = program.captured.facts[plan.layer.name].positions
    positions = seen.positions if example is None else example
    kernels, printed, refusals = seen.kernels or graphs.kernels(), PrintableGraphs(graphs), graphs.refusals()
    found = seen.found, seen.permutation, seen.sample
    return LayerReport(plan, printed, status, positions, kernels, seen.choices, refusals, *found)
