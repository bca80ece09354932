"""Mixed N:M: for each layer one of several patterns, so that the model loses least within a budget (DominoSearch)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real

from nmcompile.api.calibrate import check_data
from nmcompile.api.compile import rewrite
from nmcompile.api.pattern_costs import COSTS, Pattern, Prices, with_patterns
from nmcompile.api.pattern_damages import measure_patterns
from nmcompile.api.request import Model, request_of
from nmcompile.arguments import Args, Kwargs
from nmcompile.checks import check_call, check_choice, check_kind, check_number
from nmcompile.config import CompileConfig
from nmcompile.errors import ConfigError
from nmcompile.ir.protocols import Backend
from nmcompile.pruning.pattern import NMPattern


def choose_patterns(
    model: Model,
    mode: str = "weights",
    *,
    patterns: Sequence[NMPattern | str],
    budget: float,
    cost: str = "macs",
    calibration: Iterable[object],
    args: Args | None = None,
    kwargs: Kwargs | None = None,
    config: CompileConfig | None = None,
    backend: str | Backend = "auto",
) -> CompileConfig:
    """Choose a pattern for each layer that a mode prunes, and return the config that says so.

    The damage that a pattern does to a layer is measured in two steps. The method of `config.masks` prunes the layer
    with every pattern, which leaves an error in its outputs. Then the model runs with this layer alone pruned by the
    pattern that leaves most; the change of the model's outputs, times the ratio of the squared errors, is the damage
    done by the others. The choice with the least sum of damages that fits into the budget is taken. The config can be
    edited, saved by `to_json`, and compiled with.

    Args:
        model, mode, args, kwargs, config, backend: as `compile` takes them; `args` tell the sizes that costs depend on.
        patterns: the candidates, `("2:4", "4:8", "1:4")`; dense is always one more.
        budget: the share of the dense cost of these layers that may remain, in (0, 1].
        cost: of a layer. `"macs"` counts the multiplications of the forward GEMMs. `"bits"` counts the storage of kept
            values and their positions. `"time"` times each layer on this machine, as `where="pays"` does; layers that
            `args` do not reach keep the pattern of `config`.
        calibration: batches, as `compile` takes them.

    Returns:
        `config` with an entry in `layers` for each layer that was chosen for.

    Raises:
        ConfigError: no pattern, a budget that no choice meets, an unknown cost, or a weight that `config` prunes in
            some of its calls only.
        CalibrationError: as `compile` raises it.
    """
    check_call(args, kwargs)
    check_choice("cost", cost, COSTS)
    check_number("budget", budget, Real, 1e-9, 1, "the share of the dense cost that may remain, above 0 and at most 1")
    check_data(calibration)
    given = _parsed(patterns)
    request = request_of(model, mode, args, kwargs, config, backend)
    if cost == "time" and args is None and kwargs is None:
        raise ConfigError("cost='time' times the layers with the inputs that an example brings them; pass args=")
    trial, batches = rewrite(request), list(calibration)
    measured = measure_patterns(trial, batches, request.config, given)
    damages = {name: one.damages for name, one in measured.items()}
    prices = COSTS[cost](request, batches, measured)
    return with_patterns(request, trial, spend(damages, prices, budget))


def _parsed(patterns: Sequence[NMPattern | str]) -> tuple[NMPattern, ...]:
    check_kind("patterns", patterns, list | tuple, "a list of patterns, as in ['2:4', '4:8']")
    found = tuple(dict.fromkeys(map(NMPattern.parse, patterns)))
    if not found:
        raise ConfigError("patterns is empty; give at least one, as in ['2:4', '4:8']")
    return found


def spend(damages: Prices, prices: Prices, share: float) -> dict[str, Pattern]:
    """Choose a pattern for each layer, so that little damage is done within a budget.

    All layers start from their cheapest pattern. Then the step to a dearer one that saves most damage for its price is
    made, as long as the budget allows: the optimum whenever such a step ends exactly at the budget, and else worse by
    less than one step.

    Args:
        damages: by layer and pattern.
        prices: by layer and pattern; None is dense. Nothing is chosen for layers without prices.
        share: the share of the dense price of all layers that may be spent.

    Raises:
        ConfigError: the cheapest patterns cost more.
    """
    chosen = {layer: min(one, key=lambda p: (one[p], damages[layer][p])) for layer, one in prices.items()}
    rest = share * sum(one[None] for one in prices.values()) - sum(prices[n][p] for n, p in chosen.items())
    if rest < 0:
        least = 1 - rest / sum(one[None] for one in prices.values()) - (1 - share)
        raise ConfigError(
            f"budget {share:g} is less than the cheapest patterns cost, {least:.3f} of dense; raise it, or give "
            "sparser patterns"
        )
    steps = [step for layer in prices for step in _steps(layer, damages[layer], prices[layer], chosen[layer])]
    closed: set[str] = set()  # A layer whose step was too dear does not skip it.
    for _, layer, pattern in sorted(steps, key=lambda step: -step[0]):
        price = prices[layer][pattern] - prices[layer][chosen[layer]]
        if layer not in closed and price <= rest:
            chosen[layer], rest = pattern, rest - price
        else:
            closed.add(layer)
    return chosen


def _steps(
    layer: str, damage: Mapping[Pattern, float], price: Mapping[Pattern, float], start: Pattern
) -> Iterator[tuple[float, str, Pattern]]:
    """Yield (damage saved for the price, layer, pattern) along the lower convex hull of a layer's patterns."""
    here = start
    while True:
        better = [p for p in price if damage[p] < damage[here] and price[p] > price[here]]
        if not better:
            return
        gains = {p: (damage[here] - damage[p]) / (price[p] - price[here]) for p in better}
        here = max(better, key=lambda p: (gains[p], price[p]))
        yield gains[here], layer, here
