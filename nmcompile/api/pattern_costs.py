"""The price of each weight with each pattern: multiplications, stored bits, or measured time."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from nmcompile.api.compile import rewrite
from nmcompile.api.measure_phases import layer_times
from nmcompile.api.request import Request
from nmcompile.config import CompileConfig, preset
from nmcompile.layer_config import Pruning
from nmcompile.pruning.pattern import NMPattern
from nmcompile.three_gemm.find_triples import triples_of

Pattern = NMPattern | None
"""The pattern of a weight; None leaves it dense."""
Prices = Mapping[str, Mapping[Pattern, float]]
"""By the full name of a weight, and by pattern."""


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


def with_patterns(request: Request, chosen: Mapping[str, Pattern]) -> CompileConfig:
    """Return the config of a request that gives each of these weights its pattern."""
    layers = dict(request.config.layers)
    for site in request.captured.sites:
        if site.weight in chosen:
            _, asked = request.config.lookup(site.layer.name, site.weight) or (None, preset(request.mode))
            assert asked is not None and asked.weight is not None
            pattern = chosen[site.weight]
            pruning = None if pattern is None else Pruning(asked.weight.operator, pattern)
            layers[site.weight] = replace(asked, weight=pruning)
    return replace(request.config, layers=layers)


def _macs(request: Request, weights: Mapping[str, Measured]) -> Prices:
    return _priced(weights, lambda one, pattern: one.macs * (pattern.density if pattern else 1.0))


def _bits(request: Request, weights: Mapping[str, Measured]) -> Prices:
    def price(one: Measured, pattern: Pattern) -> float:
        if pattern is None:
            return one.elements * one.bits
        positions = math.ceil(math.log2(math.comb(pattern.block, pattern.n_keep)))
        return one.elements * (pattern.n_keep * one.bits + positions) / pattern.block

    return _priced(weights, price)


def _priced(weights: Mapping[str, Measured], price: Callable[[Measured, Pattern], float]) -> Prices:
    return {name: {pattern: price(one, pattern) for pattern in one.damages} for name, one in weights.items()}


def _time(request: Request, weights: Mapping[str, Measured]) -> Prices:
    """Time each layer with each pattern, in the model's mode, `train()` or `eval()`."""
    prices: dict[str, dict[Pattern, float]] = {name: {} for name in weights}
    for pattern in dict.fromkeys(pattern for one in weights.values() for pattern in one.damages if pattern):
        fitting = [name for name, one in weights.items() if pattern in one.damages]
        config = with_patterns(request, dict.fromkeys(fitting, pattern))
        trial = rewrite(replace(request, config=config))
        times = layer_times(trial, request.args, request.kwargs)
        for triple in triples_of(trial):
            name, found = triple.site.weight, times.get(triple.layer.name)
            if name in fitting and found is not None:
                prices[name].setdefault(None, found[()])
                prices[name][pattern] = found[max(found, key=len)]
    return prices


COSTS: Mapping[str, Callable[[Request, Mapping[str, Measured]], Prices]] = {
    "macs": _macs,
    "bits": _bits,
    "time": _time,
}
"""The costs that a budget can be of."""
