"""`bench`: times a whole step of a model, dense and pruned, in turns, and finds where the time goes."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn

from nmcompile.api.bench_report import ALL, DENSE, PAYS, BenchReport
from nmcompile.api.compile import compile as compile_model
from nmcompile.api.decompile import decompile, is_compiled
from nmcompile.api.inspect import inspect
from nmcompile.api.step_parts import step_parts
from nmcompile.api.whole_step import wall_seconds, whole_step
from nmcompile.arguments import Args, Kwargs
from nmcompile.backends.shared.timing import Turns, medians_in_turns
from nmcompile.checks import check_call, check_kind
from nmcompile.config import CompileConfig, given_config
from nmcompile.errors import ConfigError
from nmcompile.ir.step_times import StepTimes
from nmcompile.three_gemm.copy_model import own_copy
from nmcompile.training.steady import period_of

TURNS = Turns(5, 40, 20.0)
MOST_PERIOD = 8  # steps in one turn, so that each counts the rebuilding of masks; a longer period does not matter
TINY = 1e-9  # a learning rate at which weights stay as they are, and the optimizer does all its work


def bench(
    model: nn.Module,
    mode: str = "training",
    *,
    args: Args | None = None,
    kwargs: Kwargs | None = None,
    config: CompileConfig | None = None,
    calibration: Iterable[object] | None = None,
) -> BenchReport:
    """Time a whole step of a model: dense, with everything pruned, and with what pays; change nothing in it.

    In `train()` a step is forward, backward from random gradients of the outputs, and SGD with momentum; in `eval()`
    the forward alone. The three run in turns in this process, each on its own copy of all tensors, and the medians
    count. The parts of a step are those of `Parts`.

    Args:
        model: plain; a compiled one is timed as it would be compiled anew.
        mode, args, kwargs, config, calibration: as `compile` takes them; `args` or `kwargs` are needed, and
            `config.where` does not matter.

    Raises:
        ConfigError: neither args nor kwargs.
        NMCompileError: as `compile`.
    """
    check_call(args, kwargs)
    check_kind("model", model, nn.Module, "an nn.Module")
    if args is None and not kwargs:
        raise ConfigError("bench times steps with example inputs; pass args=")
    asked, plain = given_config(config), decompile(model) if is_compiled(model) else model
    batches = None if calibration is None else list(calibration)
    models = {DENSE: own_copy(plain)}
    for where in (ALL, PAYS):
        pruned = replace(asked, where=where)
        models[where] = compile_model(
            own_copy(plain), mode, args=args, kwargs=kwargs, config=pruned, calibration=batches
        )
    return _timed(models, mode, args or (), kwargs or {}, _period(asked, plain.training))


def _period(config: CompileConfig, is_trained: bool) -> int:
    """Return the steps of a turn: those between two rebuilds of masks, if they are few."""
    period = period_of(config.refresh) if is_trained else None
    return 1 if period is None or period > MOST_PERIOD else period


def _timed(models: dict[str, nn.Module], mode: str, args: Args, kwargs: Kwargs, count: int) -> BenchReport:
    plain = models[DENSE]
    devices = {parameter.device for parameter in plain.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(list(devices)):
        steps = {name: optimized_step(one, args, kwargs) for name, one in models.items()}
        times = medians_in_turns(steps, lambda step: wall_seconds(step, devices, count), TURNS)
        parts = step_parts(steps, times, count, bool(devices))
    fastest = min((ALL, PAYS), key=times.__getitem__)
    report = replace(inspect(models[fastest]), step_times=StepTimes(times[DENSE], times[fastest]))
    step = "forward, backward and optimizer" if plain.training else "forward"
    return BenchReport(type(plain).__name__, mode, step, _setting(devices), parts, report)


def optimized_step(model: nn.Module, args: Args, kwargs: Kwargs) -> Callable[[], object]:
    """Return a step of `whole_step`, followed in `train()` by a step of SGD with momentum."""
    backward = whole_step(model, args, kwargs)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not (model.training and parameters):
        return backward
    optimizer = torch.optim.SGD(parameters, TINY, momentum=0.9)

    def step() -> None:
        for parameter, gradient in zip(parameters, backward(), strict=False):  # those of inputs follow
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return step


def _setting(devices: set[torch.device]) -> dict[str, str | int]:
    device = torch.cuda.get_device_name() if devices else "CPU"
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
