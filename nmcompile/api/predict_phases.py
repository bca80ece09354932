"""`CompileConfig(where="likely")`: finds the phases that pruning makes slower by cost models alone.

No clock and no run of the model has a part in it, so every rank, and every machine with the same type of device,
decides the same for the same `args`.
"""

import itertools
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nmcompile.api.choose_phases import Times, choices_of, decide, optional_phases
from nmcompile.api.layer_costs import Seconds, Setting, predict_phases
from nmcompile.api.layer_steps import asks_gradient
from nmcompile.api.pipeline import plan_and_lower
from nmcompile.api.request import Request
from nmcompile.config import Phase
from nmcompile.errors import ConfigError
from nmcompile.ir.plan import DensePhases
from nmcompile.ir.program import Program, ThreeGraphs

MARGIN = 0.9  # × the dense time, which pruning must stay below: predictions err by about a tenth
LEAST_LOSS = 1e-3  # seconds a step that are worth a line
VERDICT = "pruning is predicted not to pay (where='likely')"

logger = logging.getLogger("nmcompile")


def find_unlikely_phases(request: Request) -> DensePhases:
    """Return the phases to leave dense: those that pruning is predicted not to make faster.

    Layers whose sizes or kernels no model knows stay as planned.

    Raises:
        ConfigError: neither args nor kwargs.
    """
    if request.args is None and not request.kwargs:
        raise ConfigError("where='likely' predicts times from the sizes that an example gives the layers; pass args=")
    program = plan_and_lower(request).program
    layers = list(predicted_layers(request, program))
    if layers and not any(seconds for _, seconds in layers):
        _warn_of_nothing_known(request)
    return {three.layer.name: _unlikely(three, seconds, request) for three, seconds in layers}


def _unlikely(three: ThreeGraphs, seconds: dict[Phase, Seconds] | None, request: Request) -> dict[Phase, str]:
    """Return the phases of a layer to leave dense, with the reason."""
    if seconds is None:
        return {}
    optional = optional_phases(three.plan, request.captured)
    return {phase: why for phase, why in decide(_times(three, seconds), MARGIN, VERDICT).items() if phase in optional}


def _warn_of_nothing_known(request: Request) -> None:
    name, reason = type(request.plain).__name__, request.captured.whole_reason
    warnings.warn(
        f"where='likely' leaves {name} as planned: no model knows its kernels, or the sizes of its layers are not known"
        f"{f' ({reason})' if reason else ''}; take where='pays', which measures",
        stacklevel=5,
    )


def tell_if_slower(request: Request, program: Program) -> None:
    """Log one line if the layers of a program are predicted to be clearly slower than without any pruning."""
    known = [found for _, seconds in predicted_layers(request, program) if seconds for found in seconds.values()]
    dense, pruned = (sum(times) for times in zip(*known, strict=True)) if known else (0.0, 0.0)
    if pruned * MARGIN > dense and pruned - dense > LEAST_LOSS:
        logger.warning(
            "%s is predicted to slow down: its pruned layers take %.1f ms a step, %.1f dense; "
            "CompileConfig(where='pays') helps",
            type(request.plain).__name__,
            pruned * 1e3,
            dense * 1e3,
        )


def predicted_layers(request: Request, program: Program) -> Iterator[tuple[ThreeGraphs, dict[Phase, Seconds] | None]]:
    """Yield each layer that prunes, with the predicted times of its GEMMs if they are known."""
    for three in program.layers.values():
        if three.plan.parts():
            setting = setting_of(request, program, three)
            yield three, None if setting is None else predict_phases(three, setting)


def setting_of(request: Request, program: Program, three: ThreeGraphs) -> Setting | None:
    """Return all that decides the times of a layer beside its graphs; None if its size or weight is not known."""
    asked = asks_gradient(request.args or (), request.kwargs or {})
    facts, weight = program.captured.facts[three.layer.name], _parameter(request.plain, program, three.layer.name)
    if facts.positions is None or weight is None:
        return None
    is_trained = request.plain.training
    return Setting(facts.positions, weight.device.type, _dtype(weight), is_trained, asked or not facts.first)


def _times(three: ThreeGraphs, seconds: dict[Phase, Seconds]) -> Times:
    """Return the time of a step for each choice among the parts of a layer."""
    times = {}
    for parts in choices_of(three.plan):
        kept = set(itertools.chain(*parts))
        times[parts] = sum(found.pruned if phase in kept else found.dense for phase, found in seconds.items())
    return times


def _parameter(model: nn.Module, program: Program, layer: str) -> Tensor | None:
    """Return a parameter that a layer's weight is, or is computed from."""
    names = program.captured.behind.get(layer, ())
    return model.get_parameter(names[0]) if names else None


def _dtype(weight: Tensor) -> torch.dtype:
    """Return the type of the operands that a layer multiplies."""
    device = weight.device.type
    is_cast = (
        weight.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    )
    return torch.get_autocast_dtype(device) if is_cast else weight.dtype
