"""What was (or would be) done to each layer, why, and what was seen of it: text, JSON and markdown."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

from nmcompile.checks import check_kind
from nmcompile.config import Phase
from nmcompile.errors import ConfigError, nearest
from nmcompile.ir.choice import Choice
from nmcompile.ir.layers import Layer
from nmcompile.ir.plan import READ, LayerPlan, Operand, PlanRow, Reverted
from nmcompile.ir.program import Program, ThreeGraphs
from nmcompile.printable import in_markdown, printable, table
from nmcompile.report.coverage import all_parameters, covered_parameters, uncaptured_parameters
from nmcompile.report.graphs import format_three_graphs, inline_forward

SCHEMA_VERSION = 1
BITS = 32
LONGEST_REASON = 1000  # characters
OPERANDS: dict[Operand, str] = {"weight": "W", "input": "X", "output": "Y", "grad_output": "dY"}


@dataclass(frozen=True)
class Observation:
    """What a run showed of one layer: whether it was called, its output positions, and for each phase the backend and
    the kernel that it chose.
    """

    called: bool
    positions: int | None
    kernels: Mapping[Phase, str] = field(default_factory=dict)
    choices: Mapping[Phase, Choice] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerReport:
    """One layer. `macs` is for one of its three GEMMs (all take the same), None where no shape is known."""

    plan: LayerPlan
    graphs: "PrintableGraphs"
    status: str
    positions: int | None
    kernels: Mapping[Phase, str]
    choices: Mapping[Phase, Choice]

    @property
    def layer(self) -> Layer:
        return self.plan.layer

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def macs(self) -> int | None:
        return None if self.positions is None else self.positions * self.layer.parameters

    def density(self, phase: Phase) -> float:
        """Expected share of the dense MACs: the product of the operands' densities (Equation 26 of the paper)."""
        rows = self.plan.rows_of(phase) if self.status == "sparse" else ()
        return math.prod(row.pattern.density for row in rows if row.pattern is not None and row.operand in READ)

    def bit_products(self, phase: Phase) -> int:
        """Bits of one operand times bits of the other: what a MAC costs in BOPs."""
        rows = self.plan.rows_of(phase) if self.status == "sparse" else ()
        grids = [row.grid for row in rows if row.grid is not None and row.operand in READ]
        return int(math.prod(grid.bits for grid in grids) * BITS ** (2 - len(grids)))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why phases are dense, or sparse where the plain rule would leave them dense; each reason once."""
        return tuple(dict.fromkeys(row.reason for row in self.plan.rows if row.reason))


class PrintableGraphs:
    """The three graphs of a layer by phase; `str()` prints them one node a line."""

    def __init__(self, graphs: ThreeGraphs) -> None:
        self.three = graphs

    def __getitem__(self, phase: Phase) -> fx.GraphModule:
        return self.three[phase]

    def __str__(self) -> str:
        return format_three_graphs(self.three)


@dataclass(frozen=True)
class Report:
    """The plan and what came of it, layer by layer."""

    model_name: str
    mode: str
    layers: tuple[LayerReport, ...]
    program: Program
    reverted: Reverted | None = None

    def layer(self, name: str) -> LayerReport:
        """One layer by name; an unknown one is an error with the nearest name."""
        check_kind("name", name, str, "the name of a layer")
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ConfigError(f"the model has no layer {name!r}; {nearest(name, (layer.name for layer in self.layers))}")

    @property
    def graph(self) -> fx.Graph | None:
        """The whole model with every rewritten layer as its forward nodes, or None (see `graph_reason`)."""
        return inline_forward(self.program)

    @property
    def graph_reason(self) -> str:
        """Why there is no whole graph."""
        return self.program.captured.whole_reason

    @property
    def summary(self) -> dict[str, Any]:
        """Totals: layers, parameters, and per phase the share of MACs in sparse GEMMs, expected MACs and BOPs.

        `parameters` counts those that a GEMM reads, each once; `uncaptured_parameters` are read by code that is not a
        layer. The MACs of `uncounted_layers`, whose shapes nobody has seen, are in none of them.
        """
        sparse = [layer for layer in self.layers if layer.status == "sparse"]
        known = [layer for layer in self.layers if layer.macs is not None]
        total = sum(layer.macs or 0 for layer in known)
        captured = self.program.captured
        uncaptured = uncaptured_parameters(captured)
        phases = {}
        for phase in Phase:
            expected = sum((layer.macs or 0) * layer.density(phase) for layer in known)
            covered = sum(layer.macs or 0 for layer in known if layer.density(phase) < 1)
            bops = sum((layer.macs or 0) * layer.density(phase) * layer.bit_products(phase) for layer in known)
            phases[phase.value] = {
                "sparse_share": covered / total if total else None,
                "macs": total or None,
                "expected_macs": expected if total else None,
                "bops": bops if total else None,
            }
        return {
            "layers": len(self.layers),
            "sparse_layers": len(sparse),
            "uncounted_layers": len(self.layers) - len(known),
            "model_parameters": all_parameters(captured),
            "parameters": covered_parameters(captured, (layer.name for layer in self.layers)) + uncaptured,
            "uncaptured_parameters": uncaptured,
            "sparse_parameters": covered_parameters(captured, (layer.name for layer in sparse)),
            "phases": phases,
        }

    def __str__(self) -> str:
        parts = printable(self._title()), self._table("simple"), self._notes(), self._kernels("simple"), self._totals()
        return "\n\n".join(part for part in parts if part)

    def to_markdown(self) -> str:
        """The same as GitHub-flavoured markdown."""
        notes = self._notes()
        notes = f"```\n{notes}\n```" if notes else ""
        parts = f"# {in_markdown(self._title())}", self._table("github"), notes, self._kernels("github"), self._totals()
        return "\n\n".join(part for part in parts if part) + "\n"

    def to_json(self) -> str:
        """Versioned JSON: `schema_version` 1."""
        captured = self.program.captured
        return json.dumps(
            {
                "schema_version": SCHEMA_VERSION,
                "model": self.model_name,
                "mode": self.mode,
                "layers": [_layer_json(layer) for layer in self.layers],
                "python": dict(captured.python),
                "skipped": dict(captured.skipped),
                "uncaptured": {
                    module: {name: list(captured.parameters[name]) for name in names}
                    for module, names in captured.uncaptured.items()
                },
                "whole_graph": captured.whole.source if captured.whole else None,
                "summary": self.summary,
                "reverted": None if self.reverted is None else asdict(self.reverted),
            },
            indent=2,
        )

    def _title(self) -> str:
        totals = self.summary
        return f"{self.model_name}, mode {self.mode!r}: {totals['sparse_layers']} of {totals['layers']} layers sparse"

    def _table(self, style: str) -> str:
        rows = [
            [
                layer.name or "(model)",
                layer.layer.kind,
                "×".join(map(str, layer.layer.weight_shape)),
                *(_cell(layer.plan.rows_of(phase)) for phase in Phase),
                "–" if layer.macs is None else f"{layer.macs / 1e6:.2f} M",
                _note(layer),
            ]
            for layer in self.layers
        ]
        headers = ["layer", "kind", "weight", *(phase.value for phase in Phase), "MACs", "note"]
        # A markdown table has no rows of several lines.
        widths = None if style == "github" else [None] * 7 + [60]
        return table(rows, headers, style, maxcolwidths=widths)

    def _kernels(self, style: str) -> str:
        """Which kernels were chosen, and what was measured; empty before a backend that chooses has run."""
        rows = [
            [layer.name or "(model)", *(str(layer.choices.get(phase, "–")) for phase in Phase)]
            for layer in self.layers
            if layer.choices
        ]
        headers = ["kernels, dense / sparse time", *(phase.value for phase in Phase)]
        return table(rows, headers, style) if rows else ""

    def _notes(self) -> str:
        captured = self.program.captured
        sections = {"stays Python": captured.python, "skipped": captured.skipped}
        lines = [
            f"{title}: {printable(name or '(model)')}: {printable(why, LONGEST_REASON)}{self._shapes(name)}"
            for title, found in sections.items()
            for name, why in found.items()
        ]
        if captured.whole is None:
            lines.append(f"no whole graph: {printable(captured.whole_reason, LONGEST_REASON)}")
        if self.reverted is not None:
            lines.append(str(self.reverted))
        return "\n".join(lines)

    def _shapes(self, module: str) -> str:
        """The parameters that a module's code multiplies by outside layers."""
        captured = self.program.captured
        shapes = {name: "×".join(map(str, captured.parameters[name])) for name in captured.uncaptured.get(module, ())}
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        return f" [{printable(listed, LONGEST_REASON)}]" if shapes else ""

    def _totals(self) -> str:
        totals = self.summary
        share = totals["sparse_parameters"] / max(1, totals["model_parameters"])
        lines = [f"parameters in sparse layers: {share:.1%} of the model's {totals['model_parameters'] / 1e6:.3f} M"]
        if totals["uncaptured_parameters"]:
            lines.append(
                f"parameters in products that are not layers, at most: {totals['uncaptured_parameters'] / 1e6:.3f} M"
            )
        for phase, values in totals["phases"].items():
            if values["macs"]:
                rest = values["expected_macs"] / values["macs"]
                lines.append(
                    f"{phase}: {values['sparse_share']:.1%} of {values['macs'] / 1e6:.1f} M MACs in sparse GEMMs; "
                    f"expected MACs {rest:.1%} of dense, BOPs {values['bops'] / (values['macs'] * BITS**2):.1%}"
                )
        if totals["uncounted_layers"]:
            lines.append(f"MACs of {totals['uncounted_layers']} layers are unknown and not counted: pass args=")
        lines.append(self._gain())
        return "\n".join(lines)

    def _gain(self) -> str:
        """What the choice of kernels gained, or that there was none."""
        choices = [choice for layer in self.layers for choice in layer.choices.values()]
        measured = [choice for choice in choices if choice.speedup is not None]
        metas = (meta for layer in self.layers for phase in Phase for meta in layer.graphs.three.metas(phase))
        if not choices and any(meta.choice is not None for meta in metas):
            return "Sparse or dense kernels are chosen when their GEMM first runs; no speed-up is claimed before."
        sparse = [choice for choice in choices if choice.kernel != "dense"]
        if not sparse:
            return "Every GEMM runs a dense kernel on the pruned operands; no speed-up is claimed."
        dense_time = sum(choice.dense_seconds or 0 for choice in measured)
        time = sum(choice.seconds or 0 for choice in measured)
        return (
            f"{len(sparse)} of {len(choices)} GEMMs that ran had a sparse kernel; those measured take "
            f"{time * 1e3:.1f} ms, and {dense_time * 1e3:.1f} ms with dense kernels on the same pruned operands. "
            "Whether a layer is faster than without pruning, CompileConfig(where='pays') measures."
        )


def build_report(
    program: Program,
    observed: Mapping[str, Observation],
    *,
    model_name: str,
    mode: str,
    reverted: Reverted | None = None,
) -> Report:
    """The report of a program; `observed` is empty where nothing was compiled."""
    ran = any(seen.called for seen in observed.values())
    layers = tuple(_layer_report(program, plan, observed, ran) for plan in program.plan)
    return Report(model_name, mode, layers, program, reverted)


def _layer_report(program: Program, plan: LayerPlan, observed: Mapping[str, Observation], ran: bool) -> LayerReport:
    name = plan.layer.name
    seen = observed.get(name, Observation(False, None))
    in_gemm = (row for row in plan.rows if row.operand in READ)
    status = "sparse" if any(row.is_sparse or row.is_quantized for row in in_gemm) else "dense"
    if observed and plan.rewritten and not seen.called:
        status = "bypassed: the model ran without calling it" if ran else "not called yet"
    # The example's positions are known for all layers alike; those of a run only for layers that were rewritten.
    example = program.captured.facts[name].positions
    positions = seen.positions if example is None else example
    graphs = PrintableGraphs(program.layers[name])
    kernels = seen.kernels or program.layers[name].kernels()
    return LayerReport(plan, graphs, status, positions, kernels, seen.choices)


def _note(layer: LayerReport) -> str:
    if layer.status not in ("sparse", "dense"):
        # Why a layer is pruned where the plain rule would leave it dense holds whether or not it ran.
        return "; ".join((layer.status, *(row.reason for row in layer.plan.rows if row.is_sparse and row.reason)))
    absorbed = (f"absorbs {layer.plan.norm!r} in eval()",) if layer.plan.norm else ()
    return "; ".join((*layer.reasons, *absorbed))


def _cell(rows: tuple[PlanRow, ...]) -> str:
    cells: dict[Operand, str] = {}
    for row in rows:
        if row.operand is not None:
            cell = cells.get(row.operand, OPERANDS[row.operand])
            cells[row.operand] = f"{cell} {row.pattern or row.grid} {row.operator}"
    return ", ".join(cells.values()) or "dense"


def _layer_json(layer: LayerReport) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.layer.kind,
        "weight_shape": list(layer.layer.weight_shape),
        "status": layer.status,
        "macs": layer.macs,
        "rows": [
            {
                "phase": row.phase.value,
                "operand": row.operand,
                "operator": row.operator,
                "pattern": None if row.pattern is None else str(row.pattern),
                "axis": row.axis,
                "grid": None if row.grid is None else str(row.grid),
                "reason": row.reason,
                "kernels": layer.kernels.get(row.phase, ""),
            }
            for row in layer.plan.rows
        ],
        "norm": layer.plan.norm,
        "choices": {phase.value: asdict(choice) for phase, choice in layer.choices.items()},
    }
