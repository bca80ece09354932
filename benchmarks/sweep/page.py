"""The page docs/coverage.md, generated from the sweep's table."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from benchmarks.sweep.needs import NEEDS
from benchmarks.sweep.row import MODES, Row
from benchmarks.sweep.run_modes import VERDICTS
from benchmarks.sweep.shares import GROUPS

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
TITLES = {"sparse": "sparse", "need": "dense with need", "needless": "dense without need", "python": "Python"}
HEAD = """# The sweep of architectures

<!-- Written by `make sweep` from benchmarks/results/coverage.csv; edit benchmarks/sweep/page.py instead. -->

{count} architectures at their smallest, with random weights: do they all compile, is any result wrong, and how much of
them is sparse? `make sweep` runs those that the table has no row for, each in a process of its own. For the kinds of
layers and wrappers see [Which models work](models.md).

| mode | what is checked |
|---|---|
| dense | outputs in `train()` and `eval()`, and gradients, equal those of eager PyTorch bit for bit |
| training | after a step the loss is finite, `verify` finds every pattern, the finalized model equals the compiled |
| inference | ONNX Runtime computes from the exported file what the module does, also at another batch size |

| verdict | meaning |
|---|---|
{verdicts}

The shares are those of the parameters that GEMMs multiply by, each counted in each of the three GEMMs, after a step in
mode `"training"` with its default config. These kinds of layers are dense *with need*; every other reason is *without
need*. *Python* is code that multiplies by a parameter and is not seen as a layer. The ends of small models are large:
in a wide model the first and the last layer are a smaller share.

| need | why |
|---|---|
{needs}
"""


def page_of(rows: Sequence[Row]) -> str:
    """Return the page in markdown."""
    verdicts = "\n".join(f"| {name} | {meaning} |" for name, meaning in VERDICTS.items())
    needs = "\n".join(f"| {kind} | {need.meaning} |" for kind, need in NEEDS.items())
    parts = [
        HEAD.format(count=len(rows), verdicts=verdicts, needs=needs),
        "## In short\n\n" + _table(_by_library(rows)),
        "## Why parameters are dense\n\n" + _table(_by_kind(rows)),
        "## Where not all is well\n\n" + (_table(list(_exceptions(rows))) or "Nowhere: every verdict is ok."),
        "## Every architecture\n\n" + _table([_line(row) for row in rows]),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(lines: list[dict[str, object]]) -> str:
    return tabulate(lines, headers="keys", tablefmt="pipe", disable_numparse=True) if lines else ""


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def _by_library(rows: Sequence[Row]) -> list[dict[str, object]]:
    libraries = dict.fromkeys(row.library for row in rows)
    groups = {library: [row for row in rows if row.library == library] for library in libraries}
    return [_total(name, group) for name, group in (*groups.items(), ("all", rows))]


def _total(name: str, rows: Sequence[Row]) -> dict[str, object]:
    """Return counts of verdicts, and the mean shares of the architectures."""
    measured = [row for row in rows if row.parameters]
    shares = {
        TITLES[group]: _percent(statistics.fmean(row.shares[group] for row in measured)) if measured else ""
        for group in GROUPS
    }
    fine = {mode: sum(row.verdicts[mode] == "ok" for row in rows) for mode in MODES}
    compiled = sum(row.is_compiled for row in rows)
    return {"library": name, "architectures": len(rows), "compiled": compiled, **fine, **shares}


def _by_kind(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return each kind of reason with its mean share, the largest first, groups in order."""
    measured = [row for row in rows if row.parameters]
    kinds = sorted({kind for row in measured for kind in row.kinds})
    found = {kind: [(row.kinds[kind], row.name) for row in measured if kind in row.kinds] for kind in kinds}
    order = sorted(kinds, key=lambda kind: (GROUPS.index(kind[0]), -sum(share for share, _ in found[kind])))
    return [
        {
            "group": TITLES[kind[0]],
            "kind": kind[1],
            "mean share": f"{sum(share for share, _ in found[kind]) / len(measured):.2%}".replace("%", " %"),
            "architectures": len(found[kind]),
            "most": f"{_percent(max(found[kind])[0])} of {max(found[kind])[1]}",
        }
        for kind in order
    ]


def _exceptions(rows: Sequence[Row]) -> Iterator[dict[str, object]]:
    for row in rows:
        for mode, verdict in row.verdicts.items():
            if verdict != "ok":
                text = verdict.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
                yield {"architecture": row.name, "mode": mode, "verdict": text}


def _line(row: Row) -> dict[str, object]:
    verdicts = {mode: verdict.partition(":")[0] for mode, verdict in row.verdicts.items()}
    shares = {TITLES[group]: _percent(row.shares[group]) if row.parameters else "" for group in GROUPS}
    return {"architecture": row.name, "library": row.library, **verdicts, **shares}
