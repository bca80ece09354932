"""Layers that differ in nothing but the numbers in their names, folded: `layers.[0-29].mlp.up_proj`."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

from nmcompile.config import Phase
from nmcompile.report.layers import LayerReport

NUMBER = re.compile("(0|[1-9][0-9]{0,17})")
"""A number as Python writes it: `01` is two of them. A name may hold more digits than Python reads as one number."""


@dataclass(frozen=True)
class Fold:
    """Layers that are planned alike and took the same kernels, in the order of the report, under one name."""

    name: str
    layers: tuple[LayerReport, ...]

    @property
    def first(self) -> LayerReport:
        return self.layers[0]

    def __str__(self) -> str:
        return self.name if len(self.layers) == 1 else f"{self.name} ×{len(self.layers)}"


def fold_layers(layers: Sequence[LayerReport]) -> tuple[Fold, ...]:
    """Fold the layers that are equal except for numbers in their names; in the order of each fold's first layer."""
    known = {layer.name: layer for layer in layers}
    folds = fold_names({layer.name: _look(layer) for layer in layers})
    return tuple(Fold(name, tuple(known[one] for one in names)) for name, names in folds)


def fold_names(looks: Mapping[str, Hashable]) -> list[tuple[str, tuple[str, ...]]]:
    """Fold names that differ in numbers only and have equal looks: one name for all, and those that it stands for.

    The folds are in the order of their first names.
    """
    found: dict[Hashable, list[str]] = {}
    for name, look in looks.items():
        found.setdefault((tuple(NUMBER.split(name)[::2]), look), []).append(name)
    folds = [fold for group in found.values() for fold in _nameable(group)]
    order = {name: number for number, name in enumerate(looks)}
    return sorted(folds, key=lambda fold: order[fold[1][0]])


def _nameable(group: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Split names until one stands for each part: for all combinations of numbers, and no others."""
    columns = _columns(group)
    if prod(map(len, columns)) == len(group):
        return [("".join(map(_joined, columns)), tuple(group))]
    last = max(number for number, column in enumerate(columns) if len(column) > 1)
    parts: dict[str, list[str]] = {}
    for name in group:
        parts.setdefault(NUMBER.split(name)[last], []).append(name)
    return [fold for part in parts.values() for fold in _nameable(part)]


def _columns(names: Iterable[str]) -> list[list[str]]:
    """Return the different parts of names at each place: text and numbers in turn."""
    return [list(dict.fromkeys(parts)) for parts in zip(*map(NUMBER.split, names), strict=True)]


def _joined(column: Sequence[str]) -> str:
    return column[0] if len(column) == 1 else _ranges(column)


def _look(layer: LayerReport) -> Hashable:
    """Return all that a fold has in common."""
    plan = layer.plan
    rows = tuple((r.phase, r.operand, r.operator, r.pattern, r.axis, r.grid, r.reason) for r in plan.rows)
    geometry = layer.layer.kind, layer.layer.weight_shape, layer.layer.groups, layer.macs
    kernels = tuple(
        (layer.kernels.get(phase), layer.choices[phase].kernel) for phase in Phase if phase in layer.choices
    )
    method = None if layer.found is None else layer.found.method
    return geometry, layer.status, rows, kernels, tuple(layer.refusals.items()), bool(plan.norm), method


def _ranges(numbers: Iterable[str]) -> str:
    """Return numbers in brackets, neighbours as a range: `"[0-2,5]"`."""
    found = sorted(map(int, numbers))
    runs = [[n for _, n in run] for _, run in groupby(enumerate(found), lambda pair: pair[1] - pair[0])]
    return f"[{','.join(str(run[0]) if len(run) == 1 else f'{run[0]}-{run[-1]}' for run in runs)}]"
