"""A report as JSON, with a version: within one version keys are only added."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from nmcompile.ir.plan import PlanRow
from nmcompile.report.layers import LayerReport

if TYPE_CHECKING:
    from nmcompile.report.report import Report

SCHEMA_VERSION = 1


def to_json(report: "Report") -> str:
    """Return the report as JSON."""
    return json.dumps(report_data(report), indent=2)


def report_data(report: "Report") -> dict[str, object]:
    """Return the report as dicts, lists, texts and numbers."""
    captured = report.program.captured
    return {
        "schema_version": SCHEMA_VERSION,
        "model": report.model_name,
        "mode": report.mode,
        "layers": [_layer(layer) for layer in report.layers],
        "python": dict(captured.python),
        "skipped": dict(captured.skipped),
        "uncaptured": {
            module: {name: list(captured.parameters[name]) for name in names}
            for module, names in captured.uncaptured.items()
        },
        "whole_graph": captured.whole.source if captured.whole else None,
        "summary": report.summary,
        "reverted": None if report.reverted is None else asdict(report.reverted),
        "predictions": [asdict(one) for one in report.predictions],
        "step_seconds": None if report.step_times is None else asdict(report.step_times),
    }


def _layer(layer: LayerReport) -> dict[str, object]:
    return {
        "name": layer.name,
        "kind": layer.layer.kind,
        "weight_shape": list(layer.layer.weight_shape),
        "status": layer.status,
        "macs": layer.macs,
        "rows": [_row(row) | {"kernels": layer.kernels.get(row.phase, "")} for row in layer.plan.rows],
        "mask": None if layer.found is None else asdict(layer.found),
        "permutation": layer.permutation,
        "norm": layer.plan.norm,
        "sample": None if layer.sample is None else asdict(layer.sample),
        "choices": {phase.value: asdict(choice) for phase, choice in layer.choices.items()},
        "refusals": {phase.value: [asdict(one) for one in found] for phase, found in layer.refusals.items()},
    }


def _row(row: PlanRow) -> dict[str, object]:
    return {
        "phase": row.phase.value,
        "operand": row.operand,
        "operator": row.operator,
        "pattern": None if row.pattern is None else str(row.pattern),
        "axis": row.axis,
        "grid": None if row.grid is None else str(row.grid),
        "reason": row.reason,
    }
