"""Shares of a model's GEMMs by parameters: sparse, dense with need, dense without need, and in Python code.

Each parameter counts once in each of the three GEMMs, so a layer whose backward GEMM alone is dense is sparse by two
thirds.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.sweep.needs import kind_of, need_of
from nmcompile import Phase
from nmcompile.report.coverage import covered_parameters, uncaptured_parameters
from nmcompile.report.layers import LayerReport
from nmcompile.report.report import Report

SPARSE, NEED, NEEDLESS, PYTHON = "sparse", "need", "needless", "python"
GROUPS = SPARSE, NEED, NEEDLESS, PYTHON
Group = tuple[str, str]


@dataclass(frozen=True)
class Shares:
    """Shares that add up to 1, by group and kind of reason; `parameters` is the number of GEMM parameters."""

    parameters: int
    shares: dict[Group, float]

    def of(self, group: str) -> float:
        """Return the share of a whole group."""
        return sum(share for (one, _), share in self.shares.items() if one == group)


def shares_of(report: Report) -> Shares:
    """Return the shares of a compiled model that made a step in mode "training"."""
    counts = Counter[Group]()
    for phase in Phase:
        counts.update(dict(_layers(report, phase)))
        counts.update(dict(_python(report)))
    total = sum(counts.values())
    shares = {group: count / total for group, count in counts.items() if count}
    return Shares(total // len(Phase), shares)


def _layers(report: Report, phase: Phase) -> Iterator[tuple[Group, int]]:
    """Count the parameters of layers by group; what two groups share belongs to the first of them."""
    groups: dict[Group, list[str]] = {}
    for layer in report.layers:
        groups.setdefault(_group(layer, phase), []).append(layer.name)
    seen, counted = list[str](), 0
    for group in sorted(groups, key=lambda group: GROUPS.index(group[0])):
        seen += groups[group]
        covered = covered_parameters(report.program.captured, seen)
        yield group, covered - counted
        counted = covered


def _group(layer: LayerReport, phase: Phase) -> Group:
    rows = layer.plan.rows_of(phase)
    if any(row.is_sparse for row in rows):
        return (SPARSE, "") if layer.status == "sparse" else (NEEDLESS, kind_of(layer.status))
    reason = "; ".join(row.reason for row in rows)
    kind = need_of(reason)
    return (NEED, kind) if kind else (NEEDLESS, kind_of(reason))


def _python(report: Report) -> Iterator[tuple[Group, int]]:
    """Count the parameters that only code without layers multiplies by; the first module in order owns a shared one."""
    captured = report.program.captured
    sizes = {name: _size(shape) for name, shape in captured.parameters.items()}
    counted = {name for names in captured.behind.values() for name in names}
    found = Counter[Group]()
    for module, names in captured.uncaptured.items():
        reason = captured.skipped.get(module) or captured.python.get(module, "")
        new = set(names) - counted
        found[PYTHON, kind_of(reason)] += sum(sizes[name] for name in new)
        counted |= new
    assert sum(found.values()) == uncaptured_parameters(captured)
    yield from found.items()


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for one in shape:
        size *= one
    return size
