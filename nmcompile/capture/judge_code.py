"""Judgement of code that is not a layer: which layers it bypasses, and which products stay Python."""

from collections.abc import Sequence

from torch import nn

from nmcompile.capture.exported import Exported
from nmcompile.capture.regions import Regions
from nmcompile.capture.routes import Routes
from nmcompile.capture.sites import FoundSite, ModuleLayers, own_matrices
from nmcompile.capture.weight_reads import WeightReads


def multiplied_by_code(model: nn.Module, layers: ModuleLayers, regions: Regions, reads: WeightReads) -> frozenset[int]:
    """Return the ids of the parameters that code may multiply by in place of a layer."""
    python = [own_matrices(model.get_submodule(name)) for name in (*layers.python, *regions.python)]
    suspected = {*reads.certain, *reads.possible, *regions.bypassed}
    read = [one.parameters for one in layers.found if one.site.layer.name in suspected and not one.site.role]
    return frozenset[int]().union(*python, *read)


def judge_reads(
    layers: list[FoundSite], regions: Regions, reads: WeightReads, routes: Routes, example: Exported | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the layers that other code reads instead of calling them, and those for which only a run can tell."""
    bypassed, suspected = {**reads.certain, **regions.bypassed}, dict(reads.possible)
    if example is not None and example.called is not None:
        modules = {one.site.layer.name: one.site.module for one in layers}
        uncalled = {name: why for name, why in reads.possible.items() if modules[name] not in example.called}
        read = {name: f"its weight is read by {reader}.forward" for name, reader in example.reads.items()}
        # A branch that the example does not take may read it.
        kept = {name for name in routes.unread if modules.get(name) in example.called}
        suspected = {name: why for name, why in bypassed.items() if name in kept} | suspected
        bypassed = {**uncalled, **read, **{name: why for name, why in bypassed.items() if name not in kept}}
    bypassed = {name: why for name, why in (routes.read | bypassed).items() if name not in routes.layers}
    hidden = bypassed.keys() | routes.layers
    return bypassed, {name: why for name, why in suspected.items() if name not in hidden}


def still_python(
    model: nn.Module, layers: ModuleLayers, regions: Regions, found: Sequence[FoundSite]
) -> dict[str, str]:
    """Return the modules with code that multiplies by parameters of no layer."""
    captured = frozenset[int]().union(*(one.parameters for one in found))
    own = {name: own_matrices(model.get_submodule(name)) for name in layers.python} | regions.uncaptured
    python = layers.python | regions.python
    return {name: why for name, why in python.items() if not own.get(name) or own[name] - captured}
