"""Layers that differ in nothing but the numbers in their names, folded: `layers.[0-29].mlp.up_proj`."""

import re
from collections.abc import Iterable, Sequence
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
    found: dict[tuple[object, ...], list[LayerReport]] = {}
    for layer in layers:
        found.setdefault(_look(layer), []).append(layer)
    folds = [fold for group in found.values() for fold in _nameable(group)]
    order = {layer.name: number for number, layer in enumerate(layers)}
    return tuple(sorted(folds, key=lambda fold: order[fold.first.name]))


def _nameable(group: Sequence[LayerReport]) -> list[Fold]:
    """Split layers until one name stands for each part: names of all combinations of numbers, and no others."""
    columns = _columns([layer.name for layer in group])
    if prod(map(len, columns)) == len(group):
        return [Fold("".join(map(_joined, columns)), tuple(group))]
    last = max(number for number, column in enumerate(columns) if len(column) > 1)
    parts: dict[str, list[LayerReport]] = {}
    for layer in group:
        parts.setdefault(NUMBER.split(layer.name)[last], []).append(layer)
    return [fold for part in parts.values() for fold in _nameable(part)]


def _columns(names: Iterable[str]) -> list[list[str]]:
    """Return the different parts of names at each place: text and numbers in turn."""
    return [list(dict.fromkeys(parts)) for parts in zip(*map(NUMBER.split, names), strict=True)]


def _joined(column: Sequence[str]) -> str:
    return column[0] if len(column) == 1 else _ranges(column)


def _look(layer: LayerReport) -> tuple[object, ...]:
    """Return all that a fold has in common."""
    plan, form = layer.plan, tuple(NUMBER.split(layer.name)[::2])
    rows = tuple((r.phase, r.operand, r.operator, r.pattern, r.axis, r.grid, r.reason) for r in plan.rows)
    geometry = layer.layer.kind, layer.layer.weight_shape, layer.layer.groups, layer.macs
    kernels = tuple(
        (layer.kernels.get(phase), layer.choices[phase].kernel) for phase in Phase if phase in layer.choices
    )
    method = None if layer.found is None else layer.found.method
    return form, geometry, layer.status, rows, kernels, tuple(layer.refusals.items()), bool(plan.norm), method


def _ranges(numbers: Iterable[str]) -> str:
    """Return numbers in brackets, neighbours as a range: `"[0-2,5]"`."""
    found = sorted(map(int, numbers))
    runs = [[n for _, n in run] for _, run in groupby(enumerate(found), lambda pair: pair[1] - pair[0])]
    return f"[{','.join(str(run[0]) if len(run) == 1 else f'{run[0]}-{run[-1]}' for run in runs)}]"
