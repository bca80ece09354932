"""One request to `compile` or `analyze`, checked, with the model captured."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.export import ExportedProgram

from nmcompile.api.choose_backends import choose_backends
from nmcompile.api.decompile import decompile, is_compiled
from nmcompile.api.solved_parts import Part, Solved
from nmcompile.arguments import Args, Kwargs
from nmcompile.capture import capture_model
from nmcompile.checks import described
from nmcompile.config import CompileConfig, given_config, preset
from nmcompile.errors import CaptureError
from nmcompile.ir.captured import Captured
from nmcompile.ir.plan import DensePhases, Reverted
from nmcompile.ir.protocols import Backend
from nmcompile.ir.step_times import StepTimes
from nmcompile.planning.plan_phases import UNREACHED
from nmcompile.three_gemm.record import RECORD
from nmcompile.three_gemm.rewritten import check_names
from nmcompile.training.earlier import Earlier, earlier_of

Model = nn.Module | ExportedProgram


@dataclass(frozen=True)
class Request:
    """One compilation of one model: the user's arguments, the captured model, and the results of trials so far.

    Args:
        model: the module tree, perhaps compiled before.
        plain: the model without an earlier compilation; `model` itself if it was never compiled.
        mode, args, kwargs, config: as `compile` takes them; trials add layers to leave dense to the config.
        backends: the backends that are offered each node, in this order.
        captured: `plain` as the compiler sees it.
        earlier: masks and clips of an earlier compilation or of a trial.
        reverted: the decision of accuracy control; None if it was not asked for.
        dense_phases: the phases in which pruning does not pay; None if no trial was timed.
        solved: masks and new values of weights, found from calibration data.
        permuted: parameters and buffers in their new order of channels, by name.
        permutations: by layer name, what the new order wins, or why there is none.
        step_times: of the whole step, pruned and dense; None if no trial of it was timed, or it stays dense.
    """

    model: nn.Module
    plain: nn.Module
    mode: str
    args: Args | None
    kwargs: Kwargs | None
    config: CompileConfig
    backends: tuple[Backend, ...]
    captured: Captured
    earlier: Earlier
    reverted: Reverted | None = None
    dense_phases: DensePhases | None = None
    solved: Mapping[Part, Solved] = field(default_factory=dict)
    permuted: Mapping[str, Tensor] = field(default_factory=dict)
    permutations: Mapping[str, str] = field(default_factory=dict)
    step_times: StepTimes | None = None

    def without(self, layers: Iterable[str]) -> "Request":
        """Return this request with more layers left dense."""
        return replace(self, config=replace(self.config, layers={**self.config.layers, **dict.fromkeys(layers)}))

    def after(self, trial: nn.Module, unreached: Iterable[str] = ()) -> "Request":
        """Return this request with the masks and clips of a trial that ran, and with the layers that it did not call.

        Args:
            trial: a model that this request was rewritten to.
            unreached: the layers whose inputs it could not calibrate.
        """
        # A trial gives every pruned layer a mask, so its masks do not tell which ones the model carried before.
        earlier = replace(earlier_of(trial), carried=self.earlier.carried)
        return replace(self, earlier=earlier, captured=_known(self.captured, earlier, unreached))


def request_of(
    model: Model,
    mode: str,
    args: Args | None,
    kwargs: Kwargs | None,
    config: CompileConfig | None,
    backend: str | Backend,
) -> Request:
    """Check the arguments of a user and capture the model; nothing is changed."""
    source, asked = _module_of(model), given_config(config)
    preset(mode)
    backends = choose_backends(backend, source)
    plain = decompile(source) if is_compiled(source) else source
    check_names(plain)
    earlier = earlier_of(source)
    before = source.__dict__[RECORD].program.captured if RECORD in source.__dict__ else None
    captured = _known(capture_model(plain, args, kwargs, before), earlier)
    return Request(source, plain, mode, args, kwargs, asked, backends, captured, earlier)


def _module_of(model: Model) -> nn.Module:
    if isinstance(model, ExportedProgram):
        return model.module()
    dynamo = sys.modules.get("torch._dynamo")
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._orig_mod  # the module that torch.compile wraps: compile the result with torch again
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model is {described(model)}; give an nn.Module or an ExportedProgram")
    return model


def _known(captured: Captured, earlier: Earlier, unreached: Iterable[str] = ()) -> Captured:
    """Return the captured model with the masks and the calls that runs have shown."""
    uncalled = {name: why for name, why in captured.suspected.items() if name in earlier.uncalled}
    bypassed = {**dict.fromkeys(unreached, UNREACHED), **uncalled, **captured.bypassed}
    return replace(captured, carried=earlier.carried, bypassed=bypassed)
