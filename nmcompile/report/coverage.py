"""Counts of the parameters that layers cover, each counted once however many layers read it."""

from collections import Counter
from collections.abc import Iterable

import torch

from nmcompile.ir.captured import Captured


def covered_parameters(captured: Captured, layers: Iterable[str]) -> int:
    """Return the number of elements that the weights of these layers are, or are computed from.

    A layer that reads a part of one parameter (an expert's matrix of a 3-d weight) covers that part.
    """
    sizes, covered = _sizes(captured), Counter[str]()
    elements = {site.layer.name: site.layer.parameters for site in captured.sites}
    for layer in layers:
        names = captured.behind.get(layer, ())
        for name in names:
            covered[name] += elements[layer] if len(names) == 1 else sizes[name]
    return sum(min(count, sizes[name]) for name, count in covered.items())


def uncaptured_parameters(captured: Captured) -> int:
    """Return the number of elements of the parameters that only code without layers multiplies by."""
    sizes = _sizes(captured)
    behind = {name for names in captured.behind.values() for name in names}
    return sum(sizes[name] for name in {name for names in captured.uncaptured.values() for name in names} - behind)


def all_parameters(captured: Captured) -> int:
    """Return the number of elements of all parameters of the model."""
    return sum(_sizes(captured).values())


def _sizes(captured: Captured) -> dict[str, int]:
    return {name: torch.Size(shape).numel() for name, shape in captured.parameters.items()}
