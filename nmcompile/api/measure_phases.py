"""`CompileConfig(where="pays")`: finds the phases that pruning makes slower, by timing each layer alone."""

import itertools
import random
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree

from nmcompile.api.pipeline import lowered
from nmcompile.arguments import Args, Kwargs
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.backends.shared.timing import seconds
from nmcompile.config import Phase
from nmcompile.errors import ConfigError, PassError
from nmcompile.ir.plan import DensePhases, LayerPlan, Plan
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import Observer, Results, Values, observing
from nmcompile.three_gemm.record import Compilation, record_of
from nmcompile.three_gemm.run_model import evaluating
from nmcompile.three_gemm.stored_weights import stored_weight
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.training.bind_layers import TripleFactory
from nmcompile.training.earlier import earlier_layers

ROUNDS = 12
HEAD_START = 8_000_000  # cycles by which a layer's step is ahead of the GPU: about four milliseconds
MARGIN = 0.95  # × the dense time, which pruning must stay below: runs differ by a few percent
NOT_REACHED = "no call with args reaches it, so whether pruning pays is not known (where='pays')"

Phases = tuple[Phase, ...]
Times = Mapping[tuple[Phases, ...], float]
Steps = Mapping[tuple[Phases, ...], Callable[[], object]]


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
    args, kwargs = args or (), kwargs or {}
    if not (distributed.is_available() and distributed.is_initialized()):
        return _measured(trial, args, kwargs)
    failure: Exception | None = None
    found: list[tuple[DensePhases, str]] = [({}, "")]
    if distributed.get_rank() == 0:
        try:
            found = [(_measured(trial, args, kwargs), "")]
        except Exception as error:  # the other ranks wait, and have to be told
            failure, found = error, [({}, f"{type(error).__name__}: {error}")]
    distributed.broadcast_object_list(found, src=0)
    ((dense, complaint),) = found
    if failure is not None:
        raise failure
    if complaint:
        raise PassError(f"the first rank, which measures for all what pays (where='pays'), failed with {complaint}")
    return dense


def _measured(trial: nn.Module, args: Args, kwargs: Kwargs) -> DensePhases:
    devices = {parameter.device for parameter in trial.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(list(devices)):
        return _measure_layers(trial, _inputs(trial, args, kwargs))


def decide(times: Times) -> dict[Phase, str]:
    """Return the phases to leave dense, with the reason.

    Args:
        times: seconds of a step of the layer by the parts that it prunes; `()` is the plain layer.
    """
    best = min((parts for parts in times if parts), key=lambda parts: times[parts])
    kept = set(itertools.chain(*best)) if times[best] < MARGIN * times[()] else set()
    everything = max(times, key=len)
    reason = (
        f"pruning does not pay (where='pays'): {times[everything] * 1e3:.2f} ms with everything pruned, "
        f"{times[best] * 1e3:.2f} at best, {times[()] * 1e3:.2f} dense"
    )
    return {phase: reason for part in everything for phase in part if phase not in kept}


class _Inputs(Observer):
    """An observer that notes the layout of the input."""

    def __init__(self, triple: GemmTriple, inputs: dict[str, Tensor]) -> None:
        super().__init__(triple)
        self.inputs = inputs

    def run(self, phase: Phase, values: Values) -> Results:
        input = values["input"]
        assert input is not None
        self.inputs[self.triple.layer.name] = torch.empty_like(input, device="meta")
        return super().run(phase, values)


@torch.no_grad()
def _inputs(trial: nn.Module, args: Args, kwargs: Kwargs) -> dict[str, Tensor]:
    """Return for each layer a meta tensor like its input in size and layout, requiring a gradient if the input does.

    If the layer pads apart from its GEMM, the input is already padded, and is padded again when timed, in all variants.
    """
    inputs: dict[str, Tensor] = {}
    with evaluating(trial), observing(triples_of(trial), lambda triple: _Inputs(triple, inputs)):
        trial(*args, **kwargs)
    # The gradient of the model's own inputs is needed only if one of them requires it.
    facts, leaves = record_of(trial)[1].program.captured.facts, pytree.tree_leaves((args, kwargs))
    asked = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
    return {name: x.requires_grad_(trial.training and (asked or not facts[name].first)) for name, x in inputs.items()}


def _measure_layers(trial: nn.Module, inputs: Mapping[str, Tensor]) -> DensePhases:
    _, record = record_of(trial)
    measured: dict[Hashable, Times] = {}
    dense: dict[str, Mapping[Phase, str]] = {}
    for triple in triples_of(trial):
        plan, name = triple.graphs.plan, triple.layer.name
        parts = plan.parts()
        if not parts:
            continue
        # A weight that was trained with a mask computes other results without it.
        carries = triple.site.weight in record.program.captured.carried and plan.find(Phase.FORWARD, "weight")
        held = parts[0] if carries else ()
        if name not in inputs:
            dense[name] = {phase: NOT_REACHED for part in parts for phase in part if phase not in held}
            continue
        problem = _problem(trial, triple, inputs[name])
        if problem not in measured:
            device = _device(trial, triple)
            measured[problem] = _typical_times(_steps(trial, record, triple, inputs[name]), device)
        dense[name] = {phase: why for phase, why in decide(measured[problem]).items() if phase not in held}
    return dense


def _problem(trial: nn.Module, triple: GemmTriple, input: Tensor) -> Hashable:
    """Return everything that decides how long a layer takes: equal problems are measured once."""
    rows = tuple(replace(row, layer="", reason="") for row in triple.graphs.plan.rows)
    layout = tuple(input.shape), input.stride(), input.dtype, input.requires_grad
    return replace(triple.layer, name=""), rows, layout, trial.training


def _typical_times(steps: Steps, device: torch.device) -> Times:
    """Return the median time of some calls of each step, in turns, after a first call that is not timed.

    The first call chooses kernels and makes masks. Each turn has another order, as each step finds the caches and the
    allocator as the previous step left them.
    """
    times: dict[tuple[Phases, ...], list[float]] = {parts: [] for parts in steps}
    order, dice = list(steps), random.Random(0)
    for turn in range(1 + ROUNDS):
        dice.shuffle(order)
        for parts in order:
            taken = seconds(steps[parts], device, HEAD_START)
            if turn:
                times[parts].append(taken)
    return {parts: statistics.median(found) for parts, found in times.items()}


def _steps(trial: nn.Module, record: Compilation, triple: GemmTriple, layout: Tensor) -> Steps:
    """Return a step of one layer for each choice of pruned parts."""
    weight, device = stored_weight(trial, triple.site), _device(trial, triple)
    dtype = layout.dtype if weight is None else weight.dtype
    values = torch.randn(triple.layer.weight_shape, device=device, dtype=dtype) if weight is None else weight.detach()
    bias = torch.zeros(triple.layer.out_features, device=device, dtype=dtype) if triple.layer.has_bias else None
    input = torch.empty_like(layout, device=device).normal_()
    operands = [input, values, bias]
    if trial.training:
        needed = layout.requires_grad, True, True
        operands = [x if x is None else x.requires_grad_(n) for x, n in zip(operands, needed, strict=True)]
    layers = dict(_variants(trial, record, triple))
    return {parts: _step(layer, operands, trial.training) for parts, layer in layers.items()}


def _device(trial: nn.Module, triple: GemmTriple) -> torch.device:
    weight = stored_weight(trial, triple.site)
    return next(trial.parameters()).device if weight is None else weight.device


def _step(run: Callable[..., Tensor], operands: Sequence[Tensor | None], training: bool) -> Callable[[], object]:
    wanted = [x for x in operands if x is not None and x.requires_grad]

    def step() -> object:
        with nullcontext() if training else torch.no_grad():
            output = run(*operands)
        return torch.autograd.grad(output, wanted, torch.ones_like(output)) if training else output

    return step


def _variants(
    trial: nn.Module, record: Compilation, triple: GemmTriple
) -> Iterator[tuple[tuple[Phases, ...], Callable[..., Tensor]]]:
    plan = triple.graphs.plan
    parts = plan.parts()
    for count in range(len(parts) + 1):
        for kept in itertools.combinations(parts, count):
            dropped = {phase: "" for part in parts if part not in kept for phase in part}
            yield kept, _layer(trial, record, triple, plan.without(dropped) if dropped else plan)


def _layer(trial: nn.Module, record: Compilation, triple: GemmTriple, plan: LayerPlan) -> Callable[..., Tensor]:
    """Return a layer by another plan, as it would run in the layer's place."""
    name, captured = plan.layer.name, record.program.captured
    if not plan.rewritten:
        graph = lowered(captured, Plan((plan,)), (ReferenceBackend(),)).layers[name][Phase.FORWARD]
        return lambda input, *rest: graph(plan.layer.prepare(input)[0], *(x for x in rest if x is not None))[0]
    program = lowered(captured, Plan((plan,)), record.backends)
    factory = TripleFactory(trial, program, record.config, 0, earlier_layers([triple]))
    return factory.make(triple.site)
