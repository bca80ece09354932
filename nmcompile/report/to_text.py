"""A report as text for a terminal, and as markdown."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nmcompile.config import Phase
from nmcompile.printable import in_markdown, printable, table
from nmcompile.report.layers import BITS
from nmcompile.report.refusals import layers_by_refusal

if TYPE_CHECKING:
    from nmcompile.report.report import Report

LONGEST_REASON = 1000  # characters
NOTE_WIDTH, LAYERS_WIDTH = 60, 40  # characters
MOST_NAMES = 3
PHASES = tuple(phase.value for phase in Phase)


def to_text(report: "Report") -> str:
    """Return the report as plain text."""
    parts = printable(_title(report)), _layers(report, "simple"), _notes(report), *_tables(report, "simple")
    return "\n\n".join(part for part in (*parts, _totals(report)) if part)


def to_markdown(report: "Report") -> str:
    """Return the report as GitHub-flavoured markdown."""
    notes = _notes(report)
    notes = f"```\n{notes}\n```" if notes else ""
    parts = f"# {in_markdown(_title(report))}", _layers(report, "github"), notes, *_tables(report, "github")
    return "\n\n".join(part for part in (*parts, _totals(report)) if part) + "\n"


def _title(report: "Report") -> str:
    totals = report.summary
    return f"{report.model_name}, mode {report.mode!r}: {totals['sparse_layers']} of {totals['layers']} layers sparse"


def _layers(report: "Report", style: str) -> str:
    rows = [
        [
            layer.name or "(model)",
            layer.layer.kind,
            "×".join(map(str, layer.layer.weight_shape)),
            *(layer.operands(phase) for phase in Phase),
            "–" if layer.macs is None else f"{layer.macs / 1e6:.2f} M",
            layer.note,
        ]
        for layer in report.layers
    ]
    # A markdown table has no rows of several lines.
    widths = None if style == "github" else [None] * 7 + [NOTE_WIDTH]
    return table(rows, ["layer", "kind", "weight", *PHASES, "MACs", "note"], style, maxcolwidths=widths)


def _tables(report: "Report", style: str) -> tuple[str, str]:
    return _kernels(report, style), _refusals(report, style)


def _kernels(report: "Report", style: str) -> str:
    """Tabulate the chosen kernels and the measured times; empty before a backend that chooses has run."""
    rows = [
        [layer.name or "(model)", *(str(layer.choices.get(phase, "–")) for phase in Phase)]
        for layer in report.layers
        if layer.choices
    ]
    return table(rows, ["kernels, dense / sparse time", *PHASES], style) if rows else ""


def _refusals(report: "Report", style: str) -> str:
    """Tabulate why the GEMMs that read a pruned operand are left to slower kernels, each reason once."""
    rows = [
        [reason, *(_some(names[phase]) for phase in Phase)]
        for reason, names in layers_by_refusal(report.layers).items()
    ]
    widths = None if style == "github" else [NOTE_WIDTH, *[LAYERS_WIDTH] * len(PHASES)]
    return table(rows, ["why no faster kernel", *PHASES], style, maxcolwidths=widths) if rows else ""


def _some(names: Sequence[str]) -> str:
    """List a few layers and count the others."""
    shown = [name or "(model)" for name in names]
    if len(shown) > MOST_NAMES + 1:
        shown[MOST_NAMES - 1 :] = [f"{shown[MOST_NAMES - 1]} and {len(shown) - MOST_NAMES} more"]
    return ", ".join(shown) or "–"


def _notes(report: "Report") -> str:
    captured = report.program.captured
    sections = {"stays Python": captured.python, "skipped": captured.skipped}
    lines = [
        f"{title}: {printable(name or '(model)')}: {printable(why, LONGEST_REASON)}{_shapes(report, name)}"
        for title, found in sections.items()
        for name, why in found.items()
    ]
    if captured.whole is None:
        lines.append(f"no whole graph: {printable(captured.whole_reason, LONGEST_REASON)}")
    if report.reverted is not None:
        lines.append(str(report.reverted))
    return "\n".join(lines)


def _shapes(report: "Report", module: str) -> str:
    """List the parameters that a module's code multiplies by outside layers."""
    captured = report.program.captured
    shapes = {name: "×".join(map(str, captured.parameters[name])) for name in captured.uncaptured.get(module, ())}
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    return f" [{printable(listed, LONGEST_REASON)}]" if shapes else ""


def _totals(report: "Report") -> str:
    totals = report.summary
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
    return "\n".join((*lines, _gain(report)))


def _gain(report: "Report") -> str:
    """Return how much the choice of kernels gained, or that there was none."""
    choices = [choice for layer in report.layers for choice in layer.choices.values()]
    measured = [choice for choice in choices if choice.speedup is not None]
    metas = (meta for layer in report.layers for phase in Phase for meta in layer.graphs.three.metas(phase))
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
        f"{_share(report)}"
        "Whether a layer is faster than without pruning, CompileConfig(where='pays') measures."
    )


def _share(report: "Report") -> str:
    """Return how much of the model is pruned: without that, a speed-up of 1.00 may be one of nothing."""
    share = report.pruned_share
    return "" if share is None else f"Pruned operands take part in {share:.1%} of the MACs of all three GEMMs. "
