"""A report in full, as text and as markdown: a row for every layer, and every kernel with its times."""

from typing import TYPE_CHECKING

from nmcompile.config import Phase
from nmcompile.printable import in_markdown, printable, table
from nmcompile.report.notes import notes, some_names
from nmcompile.report.refusals import layers_by_refusal
from nmcompile.report.totals import title, total_lines

if TYPE_CHECKING:
    from nmcompile.report.report import Report

NOTE_WIDTH, LAYERS_WIDTH = 60, 40  # characters
PHASES = tuple(phase.value for phase in Phase)


def to_full_text(report: "Report") -> str:
    """Return the whole report as plain text."""
    parts = printable(title(report)), _layers(report, "simple"), "\n".join(notes(report)), *_tables(report, "simple")
    return "\n\n".join(part for part in (*parts, "\n".join(total_lines(report))) if part)


def to_markdown(report: "Report") -> str:
    """Return the report as GitHub-flavoured markdown."""
    told = "\n".join(notes(report))
    told = f"```\n{told}\n```" if told else ""
    parts = f"# {in_markdown(title(report))}", _layers(report, "github"), told, *_tables(report, "github")
    return "\n\n".join(part for part in (*parts, "\n".join(total_lines(report))) if part) + "\n"


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
        [reason, *(some_names(names[phase]) for phase in Phase)]
        for reason, names in layers_by_refusal(report.layers).items()
    ]
    widths = None if style == "github" else [NOTE_WIDTH, *[LAYERS_WIDTH] * len(PHASES)]
    return table(rows, ["why no faster kernel", *PHASES], style, maxcolwidths=widths) if rows else ""
