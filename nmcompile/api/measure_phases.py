"""`CompileConfig(where="pays")`, layer by layer: finds the phases that pruning makes slower, by timing each alone."""

from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from nmcompile.api.choose_phases import Times, decide, optional_phases
from nmcompile.api.first_rank import of_first_rank
from nmcompile.api.layer_steps import device_of, inputs_of, steps_of
from nmcompile.arguments import Args, Kwargs
from nmcompile.backends.shared.timing import Turns, medians_in_turns, seconds
from nmcompile.config import Phase
from nmcompile.errors import ConfigError
from nmcompile.ir.plan import DensePhases
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.record import record_of
from nmcompile.three_gemm.triple import GemmTriple

TURNS = Turns(5, 12, 0.3)
HEAD_START = 8_000_000  # cycles by which a layer's step is ahead of the GPU: about four milliseconds
MARGIN = 0.95  # × the dense time, which pruning must stay below: runs differ by a few percent
VERDICT = "pruning does not pay (where='pays')"
NOT_REACHED = "no call with args reaches it, so whether pruning pays is not known (where='pays')"


def find_dense_phases(trial: nn.Module, args: Args | None, kwargs: Kwargs | None) -> DensePhases:
    """Return the phases to leave dense, the same on all ranks: the first one measures.

    Each layer is timed with the input that `args` bring it: every combination of its pruned phases, and the plain
    layer. In `train()` that is forward and backward, in `eval()` the forward alone.

    Args:
        trial: compiled, everything pruned; neither it nor any random state is changed.
        args, kwargs: for one call of it.

    Raises:
        ConfigError: neither args nor kwargs.
        PassError: on another rank, that the first one failed.
    """
    if args is None and kwargs is None:
        raise ConfigError("where='pays' times the layers with the inputs that an example brings them; pass args=")
    times, captured = layer_times(trial, args, kwargs), record_of(trial)[1].program.captured
    dense: dict[str, Mapping[Phase, str]] = {}
    for triple in triples_of(trial):
        name, plan = triple.layer.name, triple.graphs.plan
        if plan.parts():
            reasons = decide(times[name], MARGIN, VERDICT) if name in times else dict.fromkeys(Phase, NOT_REACHED)
            optional = optional_phases(plan, captured)
            dense[name] = {phase: reason for phase, reason in reasons.items() if phase in optional}
    return dense


def layer_times(trial: nn.Module, args: Args | None, kwargs: Kwargs | None) -> dict[str, Times]:
    """Return the times of each layer that an example reaches, by the parts that it prunes; see `find_dense_phases`."""
    return of_first_rank(lambda: _measured(trial, args or (), kwargs or {}))


def _measured(trial: nn.Module, args: Args, kwargs: Kwargs) -> dict[str, Times]:
    devices = {parameter.device for parameter in trial.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(list(devices)):
        return _measure_layers(trial, inputs_of(trial, args, kwargs))


def _measure_layers(trial: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Times]:
    _, record = record_of(trial)
    measured: dict[Hashable, Times] = {}
    times: dict[str, Times] = {}
    for triple in triples_of(trial):
        name = triple.layer.name
        if not triple.graphs.plan.parts() or name not in inputs:
            continue
        problem = _problem(trial, triple, inputs[name])
        if problem not in measured:
            clock = partial(seconds, device=device_of(trial, triple), head_start=HEAD_START)
            measured[problem] = medians_in_turns(steps_of(trial, record, triple, inputs[name]), clock, TURNS)
        times[name] = measured[problem]
    return times


def _problem(trial: nn.Module, triple: GemmTriple, input: Tensor) -> Hashable:
    """Return everything that decides how long a layer takes: equal problems are measured once."""
    rows = tuple(replace(row, layer="", reason="") for row in triple.graphs.plan.rows)
    layout = tuple(input.shape), input.stride(), input.dtype, input.requires_grad
    return replace(triple.layer, name=""), rows, layout, trial.training
