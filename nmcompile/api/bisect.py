"""`bisect`: finds the layers whose pruning or quantization breaks a user's check."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from nmcompile.api.analyze import analyze
from nmcompile.api.compile import compile as compile_model
from nmcompile.api.decompile import decompile, is_compiled
from nmcompile.api.delta_debugging import minimal
from nmcompile.arguments import Args, Kwargs
from nmcompile.checks import check_call, check_callable, check_kind
from nmcompile.config import CompileConfig, Phase, given_config, preset
from nmcompile.errors import ConfigError
from nmcompile.ir.captured import Site
from nmcompile.ir.plan import LayerPlan
from nmcompile.layer_config import LayerConfig
from nmcompile.printable import printable
from nmcompile.report.folding import fold_names
from nmcompile.three_gemm.copy_model import own_copy

SCHEMA_VERSION = 1
PRUNING, QUANTIZATION = "pruning", "quantization"


class Unit(NamedTuple):
    """The pruning or the quantization of one layer."""

    layer: str
    what: str


@dataclass(frozen=True)
class BisectReport:
    """The units that break a check, and a config without them, which passes it.

    Args:
        culprits: none of them can be left in; empty if nothing breaks the check.
        config: passes the check.
        trials: the number of models that were checked.
        units: the number of units that were searched.
    """

    culprits: tuple[Unit, ...]
    config: CompileConfig
    trials: int
    units: int

    def __str__(self) -> str:
        tried = f"{self.trials} models were checked, with {self.units} parts to leave out."
        if not self.culprits:
            return f"Nothing breaks the check. {tried}"
        looks: dict[str, tuple[str, ...]] = {}
        for unit in self.culprits:
            looks[unit.layer] = (*looks.get(unit.layer, ()), unit.what)
        lines = [f"  {_shown(*fold)}: {' and '.join(looks[fold[1][0]])}" for fold in fold_names(looks)]
        return "\n".join(["The check passes without these, and fails with any of them:", *lines, tried])

    def to_json(self) -> str:
        """Return versioned JSON; `config` is what `CompileConfig.from_json` reads."""
        data = {
            "schema_version": SCHEMA_VERSION,
            "culprits": [unit._asdict() for unit in self.culprits],
            "trials": self.trials,
            "units": self.units,
            "config": json.loads(self.config.to_json()),
        }
        return json.dumps(data, indent=2)


def _shown(name: str, layers: Sequence[str]) -> str:
    text = printable(name or "(model)")
    return text if len(layers) == 1 else f"{text} ×{len(layers)}"


def bisect(
    model: nn.Module,
    check: Callable[[nn.Module], bool],
    mode: str = "training",
    *,
    args: Args | None = None,
    kwargs: Kwargs | None = None,
    config: CompileConfig | None = None,
    calibration: Iterable[object] | None = None,
) -> BisectReport:
    """Find the layers whose pruning or quantization breaks a check, by delta debugging; change nothing in the model.

    The result is minimal: the check passes without the culprits, and fails with any one of them. Where several layers
    break it only together, one of them is enough. If it is no matter of single layers, the set may not be the smallest.

    Args:
        model: plain; a compiled one is compiled anew.
        check: takes a compiled model, with tensors of its own, and returns whether it is good; AssertionError is no.
        mode, args, kwargs, config, calibration: as `compile` takes them.

    Raises:
        ConfigError: the check fails even with nothing pruned or quantized, or the mode does nothing to the model.
    """
    check_callable("check", check, "a function that takes a compiled model and returns whether it is good")

    def checked(candidate: CompileConfig) -> bool:
        compiled = compile_model(own_copy(plain), mode, args=args, kwargs=kwargs, config=candidate, calibration=batches)
        try:
            return bool(check(compiled))
        except AssertionError:
            return False

    check_kind("model", model, nn.Module, "an nn.Module")
    plain = decompile(model) if is_compiled(model) else model
    batches = None if calibration is None else list(calibration)
    return bisect_config(plain, checked, mode, args=args, kwargs=kwargs, config=config)


def bisect_config(
    model: nn.Module,
    check: Callable[[CompileConfig], bool],
    mode: str,
    *,
    args: Args | None = None,
    kwargs: Kwargs | None = None,
    config: CompileConfig | None = None,
) -> BisectReport:
    """Find the same by a check that takes the config to compile with; see `bisect`."""
    check_call(args, kwargs)
    asked = given_config(config)
    report = analyze(model, mode, args=args, kwargs=kwargs, config=asked)
    asked, plans = _by_layer(asked, report.program.captured.sites), {one.name: one.plan for one in report.layers}
    units = [unit for plan in plans.values() for unit in _units(plan)]
    if not units:
        raise ConfigError(f"mode {mode!r} prunes and quantizes nothing in {type(model).__name__}; nothing to search")
    tried: dict[frozenset[Unit], bool] = {}

    def passes(left_out: frozenset[Unit]) -> bool:
        if left_out not in tried:
            tried[left_out] = check(without(asked, mode, plans, left_out))
        return tried[left_out]

    if not passes(frozenset()) and not passes(frozenset(units)):
        raise ConfigError("the check fails even with nothing pruned or quantized; it does not depend on that")
    culprits = () if passes(frozenset()) else minimal(units, passes)
    return BisectReport(culprits, without(asked, mode, plans, culprits), len(tried), len(units))


def _by_layer(config: CompileConfig, sites: Iterable[Site]) -> CompileConfig:
    """Name layers in the place of their weights, whose entries would hide those of the layers left out."""
    named = {site.layer.name: config.layers[site.weight] for site in sites if site.weight in config.layers}
    weights = {site.weight for site in sites}
    return replace(config, layers={key: one for key, one in config.layers.items() if key not in weights} | named)


def _units(plan: LayerPlan) -> list[Unit]:
    kinds = {PRUNING: any(row.is_sparse for row in plan.rows), QUANTIZATION: any(row.is_quantized for row in plan.rows)}
    return [Unit(plan.layer.name, what) for what, is_done in kinds.items() if is_done]


def without(
    config: CompileConfig, mode: str, plans: Mapping[str, LayerPlan], left_out: Iterable[Unit]
) -> CompileConfig:
    """Return the config with some units left out; a layer that nothing is left of becomes dense."""
    removed: dict[str, list[str]] = {}
    for unit in left_out:
        removed.setdefault(unit.layer, []).append(unit.what)
    layers = {name: _rest(plans[name], config, mode, whats) for name, whats in removed.items()}
    return replace(config, layers={**config.layers, **layers})


def _rest(plan: LayerPlan, config: CompileConfig, mode: str, removed: Sequence[str]) -> LayerConfig | None:
    """Return what is left of a layer's config: only what the plan carries out, as asking for more is an error."""
    if {unit.what for unit in _units(plan)} == set(removed):
        return None
    found = config.lookup(plan.layer.name, f"{plan.layer.name}.weight".lstrip("."))
    asked = preset(mode) if found is None or found[1] is None else found[1]
    if PRUNING in removed:
        input_bits = asked.input_bits if plan.grid_row("input") else None
        return LayerConfig(weight_bits=asked.weight_bits, input_bits=input_bits)
    return LayerConfig(
        weight=asked.weight if plan.find(Phase.FORWARD, "weight") else None,
        input=asked.input if plan.find(Phase.FORWARD, "input") else None,
        backward_gradient=asked.backward_gradient if plan.find(Phase.BACKWARD, "grad_output") else None,
        update_gradient=asked.update_gradient if plan.find(Phase.UPDATE, "grad_output") else None,
    )
