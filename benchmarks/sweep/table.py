"""The sweep's table as CSV: a row for each architecture, written after each one, so a sweep can be taken up again."""

import csv
from collections.abc import Iterable
from pathlib import Path

from benchmarks.sweep.row import MODES, Row
from benchmarks.sweep.shares import GROUPS

COLUMNS = "name", "library", "compiled", *MODES, "parameters", *GROUPS, "kinds", "seconds"


def read_table(path: Path) -> dict[str, Row]:
    """Return the rows of a file by name; none if there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {line["name"]: _row(line) for line in csv.DictReader(file)}


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows, in place of the file."""
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(_line, rows))
    new.replace(path)


def _line(row: Row) -> dict[str, object]:
    kinds = "; ".join(f"{group}: {kind} {share:.4f}" for (group, kind), share in sorted(row.kinds.items()))
    return {
        "name": row.name,
        "library": row.library,
        "compiled": "yes" if row.is_compiled else "no",
        **row.verdicts,
        "parameters": row.parameters,
        **{group: f"{share:.4f}" for group, share in row.shares.items()},
        "kinds": kinds,
        "seconds": f"{row.seconds:.1f}",
    }


def _row(line: dict[str, str]) -> Row:
    kinds = {}
    for part in filter(None, line["kinds"].split("; ")):
        named, _, share = part.rpartition(" ")
        group, _, kind = named.partition(": ")
        kinds[group, kind] = float(share)
    return Row(
        line["name"],
        line["library"],
        {mode: line[mode] for mode in MODES},
        int(line["parameters"]),
        {group: float(line[group] or 0) for group in GROUPS},
        kinds,
        float(line["seconds"]),
    )
