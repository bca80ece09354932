"""A report for notebooks: the text for a screen as a static HTML table, every name escaped."""

from html import escape
from typing import TYPE_CHECKING

from tabulate import tabulate

from nmcompile.printable import printable
from nmcompile.report.legend import Legend
from nmcompile.report.notes import LONGEST_REASON, grouped_notes
from nmcompile.report.to_screen import screen_rows
from nmcompile.report.totals import title, total_lines

if TYPE_CHECKING:
    from nmcompile.report.report import Report


def to_notebook(report: "Report") -> str:
    """Return the report as HTML without code or style; a page of its own is `Report.to_html`."""
    legend = Legend(report.layers)
    headers, rows, rest = screen_rows(report, legend)
    cells = [list(map(printable, row)) for row in rows]
    shown = tabulate(cells, headers, tablefmt="html", disable_numparse=True)  # escapes
    entries = [
        *(f"{letter}: {plan}" for plan, letter in legend.letters.items()),
        *(f"{number}: {reason}" for reason, number in legend.numbers.items()),
        *grouped_notes(report),
    ]
    lists = _paragraph(total_lines(report)), shown, _paragraph([rest] if rest else []), _paragraph(entries)
    return f"<div><h4>{_text(title(report))}</h4>{''.join(lists)}</div>"


def _paragraph(lines: list[str]) -> str:
    return f"<p>{'<br>'.join(map(_text, lines))}</p>" if lines else ""


def _text(line: str) -> str:
    return escape(printable(line, LONGEST_REASON))
