"""The price of each weight with each pattern: multiplications, stored bits, or measured time."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from nmcompile.api.compile import find_clips, rewrite
from nmcompile.api.measure_phases import layer_times
from nmcompile.api.request import Request
from nmcompile.api.stops import mask_name
from nmcompile.config import CompileConfig, preset
from nmcompile.errors import ConfigError
from nmcompile.ir.captured import Site
from nmcompile.layer_config import LayerConfig
from nmcompile.pruning.pattern import NMPattern
from nmcompile.three_gemm.find_triples import triples_of

Pattern = NMPattern | None
"""The pattern of a weight; None leaves it dense."""
Prices = Mapping[str, Mapping[Pattern, float]]
"""Prices by pattern for each mask, under the full name of its weight."""


@dataclass(frozen=True)
class Measured:
    """Measurements of one weight.

    Args:
        damages: by pattern, the squared relative change of the model's outputs; 0 for dense.
        macs: multiplications of the forward GEMMs over the calibration data, dense.
        elements: of the weight.
        bits: of one stored value.
    """

    damages: Mapping[Pattern, float]
    macs: int
    elements: int
    bits: int


def with_patterns(request: Request, trial: nn.Module, chosen: Mapping[str, Pattern]) -> CompileConfig:
    """Return the config of a request that gives each of these weights its pattern, in every layer that shares it.

    Args:
        request: whose config is changed.
        trial: what the request is rewritten to.
        chosen: by the name of the mask.

    Raises:
        ConfigError: the config leaves a call of such a weight dense, but not all of them.
    """
    layers = dict(request.config.layers)
    masks = {triple.site.weight: mask_name(triple) for triple in triples_of(trial) if triple.mask is not None}
    for site in request.captured.sites:
        if masks.get(site.weight) in chosen:
            layers[site.weight] = _with_pattern(request, site, chosen[masks[site.weight]])
    return replace(request.config, layers=layers)


def _with_pattern(request: Request, site: Site, pattern: Pattern) -> LayerConfig:
    """Return what the config asks of a layer, with another pattern for its weight."""
    _, asked = request.config.lookup(site.layer.name, site.weight) or (None, preset(request.mode))
    if asked is None or asked.weight is None:
        raise ConfigError(
            f"CompileConfig.layers leaves layer {site.layer.name!r} dense, but another call of {site.weight!r} is "
            "pruned, and patterns are chosen for whole weights; leave all calls of this weight dense, or none"
        )
    return replace(asked, weight=None if pattern is None else replace(asked.weight, pattern=pattern))


def _macs(request: Request, batches: Sequence[object], weights: Mapping[str, Measured]) -> Prices:
    return _priced(weights, lambda one, pattern: one.macs * (pattern.density if pattern else 1.0))


def _bits(request: Request, batches: Sequence[object], weights: Mapping[str, Measured]) -> Prices:
    def price(one: Measured, pattern: Pattern) -> float:
        if pattern is None:
            return one.elements * one.bits
        positions = math.ceil(math.log2(math.comb(pattern.block, pattern.n_keep)))
        return one.elements * (pattern.n_keep * one.bits + positions) / pattern.block

    return _priced(weights, price)


def _priced(weights: Mapping[str, Measured], price: Callable[[Measured, Pattern], float]) -> Prices:
    return {name: {pattern: price(one, pattern) for pattern in one.damages} for name, one in weights.items()}


def _time(request: Request, batches: Sequence[object], weights: Mapping[str, Measured]) -> Prices:
    """Time each layer with each pattern, in the model's mode, `train()` or `eval()`.

    Weights that no layer reads in a call with the request's `args` get no prices.
    """
    calibrated = find_clips(request, batches)
    trial = rewrite(calibrated)
    prices: dict[str, dict[Pattern, float]] = {}
    for pattern in dict.fromkeys(pattern for one in weights.values() for pattern in one.damages if pattern):
        fitting = [name for name, one in weights.items() if pattern in one.damages]
        config = with_patterns(calibrated, trial, dict.fromkeys(fitting, pattern))
        dense, pruned = _times(replace(calibrated, config=config))
        for name in fitting:
            if name in pruned:
                prices.setdefault(name, {None: dense[name]})[pattern] = pruned[name]
    return prices


def _times(request: Request) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Return the time of all layers that read a weight, dense and pruned, by the name of its mask."""
    trial = rewrite(request)
    times = layer_times(trial, request.args, request.kwargs)
    dense: dict[str, float] = defaultdict(float)
    pruned: dict[str, float] = defaultdict(float)
    for triple in triples_of(trial):
        if triple.mask is not None and triple.layer.name in times:
            found = times[triple.layer.name]
            dense[mask_name(triple)] += found[()]
            pruned[mask_name(triple)] += found[max(found, key=len)]
    return dense, pruned


COSTS: Mapping[str, Callable[[Request, Sequence[object], Mapping[str, Measured]], Prices]] = {
    "macs": _macs,
    "bits": _bits,
    "time": _time,
}
"""The costs that a budget can be of: (request, calibration batches, measurements by mask) -> prices."""
