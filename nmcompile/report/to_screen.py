"""A report that fits a screen: totals first, equal layers folded, reasons as a numbered legend."""

from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from nmcompile.config import Phase
from nmcompile.printable import printable, table
from nmcompile.report.folding import Fold, fold_layers
from nmcompile.report.legend import Legend
from nmcompile.report.notes import grouped_notes
from nmcompile.report.totals import title, total_lines

if TYPE_CHECKING:
    from nmcompile.report.report import Report

WIDTH = 100  # characters
MOST_ROWS = 24
MOST_LINES = {"plans": 6, "reasons": 11, "notes": 6}
LONGEST_WEIGHT = 22  # characters
LONGEST_ENTRY = 280  # characters of a legend's entry
MOST_NUMBERS = 4
SHORTEST_NAME = 20  # characters
UNITS = (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")
GAP = 2  # characters between columns, and after a header
MORE = "Each layer and kernel: print(report.full()); graphs and masks: report.to_html(path)."


def to_screen(report: "Report") -> str:
    """Return the report in about 60 lines of 100 characters at most."""
    legend = Legend(report.layers)
    parts = _wrapped([printable(title(report))]), _wrapped(total_lines(report)), _table(report, legend)
    explained = [
        *_capped((f"{letter}: {plan}" for plan, letter in legend.letters.items()), "plans"),
        *_capped((f"{number}: {reason}" for reason, number in legend.numbers.items()), "reasons"),
        *_capped(grouped_notes(report), "notes"),
    ]
    return "\n\n".join("\n".join(lines) for lines in (*parts, [*explained, MORE]) if lines)


def screen_rows(report: "Report", legend: Legend) -> tuple[list[str], list[list[str]], str]:
    """Return the headers and rows of the table, and a text on the rows that are left out for room."""
    folds = fold_layers(report.layers)
    shown = sorted(sorted(folds, key=_size, reverse=True)[:MOST_ROWS], key=folds.index)
    headers, rows = (
        ["layer", "weight", "plan", "MACs each", "ms dense/chosen", "why"],
        [_row(one, legend) for one in shown],
    )
    used = [column for column in range(len(headers)) if column < 3 or any(row[column] for row in rows)]
    left = [fold for fold in folds if fold not in shown]
    count = sum(len(fold.layers) for fold in left)
    rest = f"and {len(left)} smaller rows, of {count} layers: print(report.full())" if left else ""
    return [headers[column] for column in used], [[row[column] for column in used] for row in rows], rest


def _table(report: "Report", legend: Legend) -> list[str]:
    headers, rows, rest = screen_rows(report, legend)
    if not rows:
        return []
    others = [max(len(headers[c]) + GAP, *(len(row[c]) for row in rows)) + GAP for c in range(1, len(headers))]
    width = max(SHORTEST_NAME, WIDTH - sum(others))
    named = [[_shortened(row[0], width), *row[1:]] for row in rows]
    return [*table(named, headers).splitlines(), *([rest] if rest else [])]


def _size(fold: Fold) -> int:
    return len(fold.layers) * (fold.first.macs or fold.first.layer.parameters)


def _row(fold: Fold, legend: Legend) -> list[str]:
    layer, numbers = fold.first, legend.why(fold.first)
    why = ", ".join(map(str, numbers[:MOST_NUMBERS])) + (", ..." if len(numbers) > MOST_NUMBERS else "")
    weight = _shortened("×".join(map(str, layer.layer.weight_shape)), LONGEST_WEIGHT)
    return [_name(fold), weight, legend.plan(layer), _amount(layer.macs), _times(fold), why]


def _amount(count: int | None) -> str:
    """Return a count with three digits and a unit."""
    if count is None:
        return ""
    size, unit = next(((size, unit) for size, unit in UNITS if count >= size), (1, ""))
    return f"{count / size:.3g} {unit}".rstrip()


def _name(fold: Fold) -> str:
    """Return the fold's name without what a terminal obeys; its count stays at the end."""
    name = printable(fold.name or "(model)")
    return name if len(fold.layers) == 1 else f"{name} ×{len(fold.layers)}"


def _times(fold: Fold) -> str:
    """Return the measured milliseconds of all GEMMs of the layers, and how many times as fast the chosen ones are."""
    choices = [layer.choices[phase] for layer in fold.layers for phase in Phase if phase in layer.choices]
    known = [(one.dense_seconds, one.seconds) for one in choices]
    pairs = [(dense, chosen) for dense, chosen in known if dense is not None and chosen]
    if not pairs:
        return ""
    dense, chosen = (sum(column) * 1e3 for column in zip(*pairs, strict=True))
    shown = (f"{time:.3g}" if time < 1000 else f"{time:.0f}" for time in (dense, chosen))
    return f"{'/'.join(shown)} = {dense / chosen:.2f}"


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: (width - 3) // 2]}...{text[-((width - 2) // 2) :]}"


def _wrapped(texts: Iterable[str], hanging: str = "") -> list[str]:
    return [line for text in texts for line in wrap(text, WIDTH, subsequent_indent=hanging, break_on_hyphens=False)]


def _capped(entries: Iterable[str], section: str) -> Sequence[str]:
    """Return the lines of a section's entries, and at its end how many entries are left out for room."""
    blocks = [_wrapped([printable(entry, LONGEST_ENTRY)], "   ") for entry in entries]
    lines: list[str] = []
    for number, block in enumerate(blocks):
        is_last = number == len(blocks) - 1
        if len(lines) + len(block) + (not is_last) > MOST_LINES[section]:
            return [*lines, f"and {len(blocks) - number} more of the {section}: print(report.full())"]
        lines += block
    return lines
