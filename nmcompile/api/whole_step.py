"""`CompileConfig(where="pays")`, at the end: leaves everything dense if that makes the whole step of a model faster.

Layers that gain alone can lose in the model, where they find colder caches and where the host may be what limits.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nmcompile.api.choose_phases import optional_phases
from nmcompile.api.first_rank import by_all_ranks, is_distributed
from nmcompile.api.measure_phases import VERDICT
from nmcompile.api.request import Request
from nmcompile.arguments import Args, Kwargs
from nmcompile.backends.shared.timing import Call, Turns, medians_in_turns
from nmcompile.config import Phase
from nmcompile.export.outputs import outputs_of
from nmcompile.ir.plan import DensePhases
from nmcompile.ir.step_times import StepTimes
from nmcompile.three_gemm.copy_model import own_copy
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.record import record_of

TURNS = Turns(7, 40, 3.0)
AHEAD = 3  # steps between two synchronizations with a GPU, which a training loop lets run ahead
SLOWER = 1.01  # × the dense time, which pruning may take: steps that are equal within the noise stay pruned

Step = Callable[[], Sequence[Tensor | None]]


def leave_slower_dense(request: Request, trial: nn.Module, build: Callable[[Request], nn.Module]) -> Request:
    """Return the request, with everything left dense if its whole step is slower than the dense model's.

    If the step fails, with `args` that `train()` does not take for example, a warning says so, and the request stays.

    Args:
        request: with the phases that are dense because their layer, timed alone, does not gain.
        trial: compiled, everything pruned.
        build: makes the model of a request, as a copy that shares every tensor.
    """
    _, record = record_of(trial)
    captured = record.program.captured
    optional = {triple.layer.name: optional_phases(triple.graphs.plan, captured) for triple in triples_of(trial)}
    chosen = request.dense_phases or {}
    dense = all_dense(optional, chosen, "")
    if dense == chosen:
        return request
    try:
        pruned_time, dense_time = by_all_ranks(lambda: step_times(request, dense, build))
    except Exception as error:  # from the model's own code, say
        message = (
            f"the whole step could not be timed (where='pays'), so each layer stays as it was timed alone: {error}"
        )
        warnings.warn(f"{message}; pass args that the model takes in its mode, train() or eval()", stacklevel=4)
        return request
    if pruned_time <= SLOWER * dense_time:
        return replace(request, step_times=StepTimes(dense_time, pruned_time))
    times = f"the whole step takes {pruned_time * 1e3:.2f} ms pruned, {dense_time * 1e3:.2f} dense"
    return replace(request, dense_phases=all_dense(optional, chosen, f"{VERDICT}: {times}"))


def all_dense(optional: Mapping[str, tuple[Phase, ...]], chosen: DensePhases, reason: str) -> DensePhases:
    """Return the plan that leaves every phase dense that may be; those that already are keep their reason."""
    return {name: dict.fromkeys(optional[name], reason) | dict(chosen[name]) for name in chosen}


def step_times(request: Request, dense: DensePhases, build: Callable[[Request], nn.Module]) -> tuple[float, float]:
    """Return the seconds of a step as requested and with these phases dense; nothing of the model is changed.

    Both run on one copy of all tensors, as a step writes to batch statistics and leaves gradients.
    """
    held = replace(request, plain=own_copy(request.plain))
    models = {"pruned": build(held), "dense": build(replace(held, dense_phases=dense))}
    devices = {parameter.device for parameter in held.plain.parameters() if parameter.is_cuda}
    steps = {name: whole_step(model, request.args or (), request.kwargs or {}) for name, model in models.items()}
    # Each rank has to take as many steps as the others.
    turns = TURNS._replace(most=TURNS.least) if is_distributed() else TURNS
    with torch.random.fork_rng(list(devices)):
        times = medians_in_turns(steps, lambda step: wall_seconds(step, devices), turns)
    return times["pruned"], times["dense"]


def whole_step(model: nn.Module, args: Args, kwargs: Kwargs) -> Step:
    """Return a step on copies of the arguments: forward and backward in `train()`, else the forward alone.

    Outputs get random gradients, always the same: a loss of these outputs may not exist, and zeros are pruned faster.
    """
    args, kwargs = pytree.tree_map_only(Tensor, _own, (args, dict(kwargs)))
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    wanted = [tensor for tensor in (*model.parameters(), *given) if tensor.requires_grad]
    drawn: dict[int, Tensor] = {}

    def gradient(place: int, output: Tensor) -> Tensor:
        if place not in drawn or drawn[place].shape != output.shape:
            drawn[place] = torch.randn_like(output)
        return drawn[place]

    def step() -> Sequence[Tensor | None]:
        with torch.set_grad_enabled(model.training):
            results = [x for x in outputs_of(model(*args, **kwargs)) if isinstance(x, Tensor) and x.requires_grad]
            if not (results and wanted):
                return results
            gradients = [gradient(place, output) for place, output in enumerate(results)]
            return torch.autograd.grad(results, wanted, gradients, allow_unused=True)

    return step


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def wall_seconds(step: Call, devices: set[torch.device], count: int = 1) -> float:
    """Return the seconds of a step, with the time that the host takes for it: the mean of `count` steps at least."""
    count = max(count, AHEAD if devices else 1)
    start = time.perf_counter()
    for _ in range(count):
        step()
    for device in devices:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count
