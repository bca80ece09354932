"""The differences of two reports: before and after a change, or on two machines."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from nmcompile.config import Phase
from nmcompile.ir.choice import Choice
from nmcompile.report.change import NOISE, Change, Value
from nmcompile.report.diff_text import diff_text
from nmcompile.report.saved_report import SavedLayer, SavedReport
from nmcompile.report.to_json import SCHEMA_VERSION


@dataclass(frozen=True)
class ReportDiff:
    """The difference of two reports; `str()` fits 100 columns.

    Args:
        before, after: the reports.
        removed, added: names of layers that only one of them has.
        changed: the changes of the layers that both have, by name; layers without any are not in it.
    """

    before: SavedReport
    after: SavedReport
    removed: tuple[str, ...]
    added: tuple[str, ...]
    changed: Mapping[str, tuple[Change, ...]]

    @property
    def totals(self) -> tuple[Change, ...]:
        """Return the changes of the whole model."""
        left = [(f"{phase.value} MACs left", phase) for phase in Phase]
        pairs: dict[str, tuple[Value, Value]] = {
            "model": (self.before.model, self.after.model),
            "mode": (self.before.mode, self.after.mode),
            "layers sparse": (_sparse(self.before), _sparse(self.after)),
            **{what: (self.before.macs_left[phase], self.after.macs_left[phase]) for what, phase in left},
            "time of measured GEMMs": _common_seconds(self.before, self.after),
        }
        return tuple(_different(pairs))

    def __str__(self) -> str:
        return diff_text(self)

    def to_json(self) -> dict[str, object]:
        """Return the difference as dicts, lists, texts and numbers."""
        return {
            "schema_version": SCHEMA_VERSION,
            "totals": [asdict(change) for change in self.totals],
            "removed": list(self.removed),
            "added": list(self.added),
            "changed": {name: [asdict(change) for change in changes] for name, changes in self.changed.items()},
        }


def diff_reports(before: SavedReport, after: SavedReport) -> ReportDiff:
    """Compare two reports, layer by layer."""
    shared = [name for name in before.layers if name in after.layers]
    changes = {name: tuple(_changes(before.layers[name], after.layers[name])) for name in shared}
    removed = tuple(name for name in before.layers if name not in after.layers)
    added = tuple(name for name in after.layers if name not in before.layers)
    return ReportDiff(before, after, removed, added, {name: found for name, found in changes.items() if found})


def _changes(before: SavedLayer, after: SavedLayer) -> Iterator[Change]:
    shapes = ("×".join(map(str, layer.shape)) for layer in (before, after))
    yield from _different({"weight": tuple(shapes), "state": (before.status, after.status)})
    for phase in Phase:
        one, other = before.choices.get(phase), after.choices.get(phase)
        texts = {
            "plan": (before.plans[phase], after.plans[phase]),
            "reason": (before.reasons[phase], after.reasons[phase]),
            "backend": (before.backends[phase], after.backends[phase]),
            "kernel": (_kernel(one), _kernel(other)),
        }
        yield from _different(texts, phase.value)
        if _is_other_time(_seconds(one), _seconds(other)):
            yield Change("time", _seconds(one), _seconds(other), phase.value)
    yield from _different({"output error of the mask": (before.error, after.error)})


def _different(pairs: Mapping[str, tuple[Value, ...]], phase: str = "") -> Iterator[Change]:
    for what, (one, other) in pairs.items():
        if one != other:
            yield Change(what, one, other, phase)


def _is_other_time(one: float | None, other: float | None) -> bool:
    """Return whether two times differ by more than noise, or only one is known."""
    if one is None or other is None:
        return one is not other
    return max(one, other) > (1 + NOISE) * min(one, other)


def _kernel(choice: Choice | None) -> str:
    return "" if choice is None else choice.kernel


def _seconds(choice: Choice | None) -> float | None:
    return None if choice is None else choice.seconds


def _sparse(report: SavedReport) -> str:
    return f"{report.sparse} of {len(report.layers)}"


def _common_seconds(before: SavedReport, after: SavedReport) -> tuple[float | None, float | None]:
    """Return the time of the GEMMs that both reports have measured, by each; None if there are none."""
    one, other = _times(before), _times(after)
    shared = one.keys() & other.keys()
    return (sum(one[key] for key in shared), sum(other[key] for key in shared)) if shared else (None, None)


def _times(report: SavedReport) -> dict[tuple[str, Phase], float]:
    choices = ((name, phase, one) for name, layer in report.layers.items() for phase, one in layer.choices.items())
    return {(name, phase): one.seconds for name, phase, one in choices if one.seconds is not None}
