"""Notes on a model's code: modules that stay Python or are skipped, no whole graph, layers reverted for accuracy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nmcompile.printable import printable

if TYPE_CHECKING:
    from nmcompile.report.report import Report

LONGEST_REASON = 1000  # characters
MOST_NAMES = 3


def notes(report: "Report") -> list[str]:
    """Return a line for each module, with the parameters that its code multiplies by outside layers."""
    lines = [
        f"{title}: {printable(name or '(model)')}: {printable(why, LONGEST_REASON)}{_shapes(report, name)}"
        for title, name, why in _modules(report)
    ]
    return [*lines, *_on_the_model(report)]


def grouped_notes(report: "Report") -> list[str]:
    """Return the notes with one line for all modules of the same reason; shapes only if a module stands alone."""
    groups: dict[tuple[str, str], list[str]] = {}
    for title, name, why in _modules(report):
        groups.setdefault((title, why), []).append(name)
    lines = [
        f"{title}: {some_names(names)}: {why}{_shapes(report, names[0]) if len(names) == 1 else ''}"
        for (title, why), names in groups.items()
    ]
    return [*lines, *_on_the_model(report)]


def some_names(names: Sequence[str]) -> str:
    """List a few layers or modules and count the others."""
    shown = [name or "(model)" for name in names]
    if len(shown) > MOST_NAMES + 1:
        shown[MOST_NAMES - 1 :] = [f"{shown[MOST_NAMES - 1]} and {len(shown) - MOST_NAMES} more"]
    return ", ".join(shown) or "–"


def _modules(report: "Report") -> list[tuple[str, str, str]]:
    captured = report.program.captured
    sections = {"stays Python": captured.python, "skipped": captured.skipped}
    return [(title, name, why) for title, found in sections.items() for name, why in found.items()]


def _on_the_model(report: "Report") -> list[str]:
    captured, lines = report.program.captured, []
    if captured.whole is None:
        lines.append(f"no whole graph: {printable(captured.whole_reason, LONGEST_REASON)}")
    if report.reverted is not None:
        lines.append(str(report.reverted))
    return lines


def _shapes(report: "Report", module: str) -> str:
    """List the parameters that a module's code multiplies by outside layers."""
    captured = report.program.captured
    shapes = {name: "×".join(map(str, captured.parameters[name])) for name in captured.uncaptured.get(module, ())}
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    return f" [{printable(listed, LONGEST_REASON)}]" if shapes else ""
