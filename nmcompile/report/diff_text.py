"""The difference of two reports as text of 100 columns: totals first, then layers that changed alike under one name."""

from collections.abc import Iterator, Sequence
from itertools import chain
from textwrap import wrap
from typing import TYPE_CHECKING

from nmcompile.config import Phase
from nmcompile.printable import printable
from nmcompile.report.change import NOISE, Change, Value
from nmcompile.report.folding import fold_names
from nmcompile.report.to_screen import LONGEST_ENTRY, WIDTH

if TYPE_CHECKING:
    from nmcompile.report.diff import ReportDiff

NOTE = f"Times that differ by less than {NOISE:.0%} count as equal."


def diff_text(diff: "ReportDiff") -> str:
    """Return the difference as text; one line says so if there is none."""
    if not (diff.totals or diff.removed or diff.added or diff.changed):
        return f"{printable(diff.after.model)}: the two reports say the same. {NOTE}"
    parts = [
        [f"{printable(diff.after.model)}, mode {printable(diff.after.mode)!r}: before → after"],
        [line for change in diff.totals for line in _wrapped(f"{change.what}: {_text([change])}")],
        list(_names("removed", diff.removed)),
        list(_names("added", diff.added)),
        *_layers(diff),
        [NOTE],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _names(title: str, names: Sequence[str]) -> Iterator[str]:
    for fold, members in fold_names(dict.fromkeys(names)):
        yield from _wrapped(f"{title}: {_shown(fold, members)}")


def _layers(diff: "ReportDiff") -> Iterator[list[str]]:
    """Yield the lines of each set of layers with the same changes; their times are summed up."""
    looks = {name: tuple(map(_look, changes)) for name, changes in diff.changed.items()}
    for fold, members in fold_names(looks):
        columns = list(zip(*(diff.changed[name] for name in members), strict=True))
        lines = (f"  {text}" for text in _merged(columns))
        yield [*_wrapped(_shown(fold, members)), *chain.from_iterable(map(_wrapped, lines))]


def _look(change: Change) -> object:
    """Return all of a change that layers under one name have in common."""
    return (change.what, change.phase, change.before is None, change.after is None) if change.is_number else change


def _merged(columns: Sequence[Sequence[Change]]) -> Iterator[str]:
    """Yield the text of each change, with the phases that it holds for; a change of all of them names none."""
    phases: dict[tuple[str, str], list[str]] = {}
    for changes in columns:
        phases.setdefault((changes[0].what, _text(changes)), []).append(changes[0].phase)
    for (what, text), found in phases.items():
        is_of_all = len(found) == len(Phase) or found == [""]
        yield f"{what}: {text}" if is_of_all else f"{what} of {', '.join(found)}: {text}"


def _text(changes: Sequence[Change]) -> str:
    before, after = (_value(changes[0].what, [getattr(one, side) for one in changes]) for side in ("before", "after"))
    return f"{before} → {after}"


def _value(what: str, values: Sequence[Value]) -> str:
    """Return a text, the sum of times, or the range of shares."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if not numbers:
        return printable(values[0] or "–", LONGEST_ENTRY)
    if "time" in what:
        return f"{sum(numbers) * 1e3:.4g} ms"
    ends = f"{min(numbers):.2%}", f"{max(numbers):.2%}"
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _shown(fold: str, members: Sequence[str]) -> str:
    name = printable(fold or "(model)")
    return name if len(members) == 1 else f"{name} ×{len(members)}"


def _wrapped(text: str) -> list[str]:
    indent = " " * (len(text) - len(text.lstrip()))
    return wrap(text, WIDTH, subsequent_indent=f"{indent}    ", break_on_hyphens=False)
