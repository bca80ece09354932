"""The front door: compile, analyze, inspect, decompile, in the order of the data flow."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from nmcompile.api.calibrate import calibrate_reached, check_data
from nmcompile.api.choose_backends import choose_backends
from nmcompile.api.measure_phases import find_dense_phases
from nmcompile.api.pipeline import bind_layers, compilation_of, install_layers
from nmcompile.api.revert_layers import revert_layers, score_of
from nmcompile.capture import capture_model
from nmcompile.checks import (
    check_call,
    check_callable,
    check_compiled,
    check_kind,
    check_number,
    described,
)
from nmcompile.config import CompileConfig, given_config, preset
from nmcompile.errors import CaptureError, ConfigError
from nmcompile.ir.captured import Captured
from nmcompile.ir.plan import DensePhases, Reverted
from nmcompile.ir.protocols import Backend
from nmcompile.planning.plan_phases import UNREACHED
from nmcompile.report.layers import Observation
from nmcompile.report.report import Report, build_report
from nmcompile.three_gemm.copy_model import share_copy
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.record import RECORD, record_of, restore_all
from nmcompile.three_gemm.rewritten import check_names
from nmcompile.training.earlier import Earlier, earlier_of

Model = nn.Module | ExportedProgram


def compile(
    model: Model,
    mode: str = "training",
    *,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    config: CompileConfig | None = None,
    backend: str | Backend = "auto",
    calibration: Iterable[Any] | None = None,
    validation: Callable[[nn.Module], float] | None = None,
    max_drop: float | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Rewrite every conv and linear node of a model into its three GEMMs, pruned according to the paper's Table 1.

    The result has the same parameters, buffers and `state_dict()` keys: an optimizer made before still trains it. Its
    modules are copies of the model's that share every tensor, or with `inplace` the model's own.

    A module whose own forward calls `F.linear` or a convolution gets a forward generated from its traced graph. Python
    values that it reads (numbers, flags, globals) are frozen at compile time, tensors and buffers are not. Code that a
    graph cannot represent stays Python, and the report says why: it tests the identity or the type of a value that is
    computed from inputs, for example. With `args`, the model also runs once in eval mode, and a generated forward whose
    results differ from its original's in any bit or class stays Python too.

    Other threads may run models meanwhile, and compile others.

    Args:
        model: a module, a `GraphModule`, an `ExportedProgram`, or a compiled model. A compiled model is planned anew,
            except that a layer with a mask stays masked, even if it turns out to be the first or the last, and a mask
            that already meets the new pattern is kept.
        mode: `"training"`, `"inference"`, a row of Table 1 (`"weights"`, `"t-weights"`, `"activations"`,
            `"gradients"`) or `"dense"`, which rewrites everything and prunes nothing.
        args, kwargs: example inputs; with them the whole graph is known even if fx cannot trace the model.
        config: anything finer than the mode.
        backend: `"auto"` (the backends that run here, by the device of the parameters), `"cpu"`, `"triton"`,
            `"cusparselt"`, `"reference"`, or a `Backend`; the reference backend runs the nodes that it does not take.
        calibration: batches for the clips of quantized inputs (see `calibrate`); without them, a clip that an earlier
            compilation found for the same grid is kept.
        validation, max_drop: a score, higher is better, and how far it may fall below the plain model's: the layers
            that hurt most are left dense until it does not fall further. Each layer costs one validation.
        inplace: edit the given module tree; always so after FSDP2's `fully_shard`, whose modules cannot be copied.

    Returns:
        A module of the model's class.

    Raises:
        ConfigError: an unknown mode, pattern, layer name or backend; `args` that are not a tuple; `validation` without
            `max_drop` or the reverse; `where="pays"` without `args`.
        CaptureError: nothing to compile, or the model refuses `args`.
        PreconditionError: a layer named in `config` cannot be pruned as asked.
        BackendUnavailable: the backend asked for cannot run here.
        CalibrationError: calibration data that no clip can be found from.
    """
    check_call(args, kwargs)
    _check_control(validation, max_drop)
    if calibration is not None:
        check_data(calibration)
    check_kind("inplace", inplace, bool, "True or False")
    source, asked, reverted = _module(model), given_config(config), None
    chosen = asked
    rewrite = partial(_rewrite, mode=mode, args=args, kwargs=kwargs, backend=backend)
    earlier = earlier_of(source)
    if calibration is not None or validation is not None:
        # On a copy: a failure leaves the model unchanged; its masks and clips are taken over.
        trial = rewrite(source, config=asked, earlier=earlier)
        if calibration is not None:
            rewrite = partial(rewrite, unreached=calibrate_reached(trial, calibration))
        earlier = replace(earlier_of(trial), carried=earlier.carried)
        if validation is not None and max_drop is not None:

            def build(layers: tuple[str, ...]) -> nn.Module:
                return rewrite(source, config=_without(asked, layers), earlier=earlier)

            names = [triple.layer.name for triple in triples_of(trial)]
            reverted = revert_layers(score_of(decompile(source), validation), names, build, validation, max_drop)
            chosen = _without(asked, reverted.layers)
    dense_phases = None
    if asked.where == "pays":
        trial = rewrite(source, config=chosen, earlier=earlier)
        dense_phases = find_dense_phases(trial, *_example(args, kwargs))
        earlier = replace(earlier_of(trial), carried=earlier.carried)
    return rewrite(
        source, config=chosen, earlier=earlier, inplace=inplace, reverted=reverted, dense_phases=dense_phases
    )


def analyze(
    model: Model,
    mode: str = "training",
    *,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    config: CompileConfig | None = None,
    backend: str | Backend = "auto",
) -> Report:
    """Report what `compile` would do, without changing anything, the random state included; take and raise the same."""
    check_call(args, kwargs)
    source, asked = _module(model), given_config(config)
    dense_phases = None
    if asked.where == "pays":
        trial = compile(source, mode, args=args, kwargs=kwargs, config=replace(asked, where="all"), backend=backend)
        dense_phases = find_dense_phases(trial, *_example(args, kwargs))
    plain = decompile(source) if is_compiled(source) else source
    check_names(plain)
    preset(mode)
    backends = choose_backends(backend, source)
    captured = _with_earlier(capture_model(plain, args, kwargs), earlier_of(source))
    done = compilation_of(captured, mode, asked, backends, dense_phases=dense_phases)
    return build_report(done.program, {}, model_name=type(plain).__name__, mode=mode)


def inspect(compiled: nn.Module) -> Report:
    """Report what was done to each layer, why, and what was observed at run time.

    Args:
        compiled: a model that `compile` made, also inside DDP, FSDP2 or `torch.compile`.

    Raises:
        StateError: the model is not compiled.
    """
    check_compiled("compiled", compiled)
    root, record = record_of(compiled)
    observed = {
        triple.layer.name: Observation(
            triple.called, triple.positions, triple.graphs.kernels(), triple.graphs.choices()
        )
        for triple in triples_of(root)
    }
    name = type(root).__name__
    return build_report(record.program, observed, model_name=name, mode=record.mode, reverted=record.reverted)


def decompile(compiled: nn.Module) -> nn.Module:
    """Return the plain model: its original classes and forwards, the same parameters and buffers, nothing masked."""
    check_compiled("compiled", compiled)
    plain = share_copy(compiled)
    restore_all(plain)
    return plain


def is_compiled(model: nn.Module) -> bool:
    """Return whether `compile` made this module, or one that it wraps."""
    check_kind("model", model, nn.Module, "a module")
    return any(RECORD in module.__dict__ for module in model.modules())


def _module(model: Model) -> nn.Module:
    if isinstance(model, ExportedProgram):
        return model.module()
    dynamo = sys.modules.get("torch._dynamo")
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._orig_mod  # the module that torch.compile wraps: compile the result with torch again
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model is {described(model)}; give an nn.Module or an ExportedProgram")
    return model


def _check_control(validation: Any, max_drop: Any) -> None:
    """Check the options of accuracy control."""
    if (validation is None) != (max_drop is None):
        raise ConfigError("validation and max_drop go together: a score, and how far it may fall")
    if validation is not None:
        check_callable("validation", validation, "a function that takes a model and returns its score, a number")
        check_number("max_drop", max_drop, Real, 0, math.inf, "how much the score may fall, a number >= 0")


def _example(args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], Any]:
    if args is None and kwargs is None:
        raise ConfigError("where='pays' times the layers with the inputs that an example brings them; pass args=")
    return args or (), kwargs


def _rewrite(
    source: nn.Module,
    *,
    mode: str,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
    config: CompileConfig,
    backend: str | Backend,
    earlier: Earlier,
    unreached: Sequence[str] = (),
    inplace: bool = False,
    reverted: Reverted | None = None,
    dense_phases: DensePhases | None = None,
) -> nn.Module:
    """Capture, plan and lower, then change the module tree; the steps that can fail come first."""
    preset(mode)
    backends = choose_backends(backend, source)
    plain = decompile(source) if is_compiled(source) else source
    check_names(plain)
    captured = _with_earlier(capture_model(plain, args, kwargs), earlier, unreached)
    done = compilation_of(captured, mode, config, backends, reverted, dense_phases)
    target = source if inplace else plain if plain is not source else share_copy(source)
    triples = bind_layers(target, done, torch.initial_seed(), earlier)
    install_layers(target, done, triples)
    return target


def _with_earlier(captured: Captured, earlier: Earlier, unreached: Sequence[str] = ()) -> Captured:
    """Add what an earlier compilation and the calibration have shown to a captured model."""
    uncalled = {name: why for name, why in captured.suspected.items() if name in earlier.uncalled}
    bypassed = {**dict.fromkeys(unreached, UNREACHED), **uncalled, **captured.bypassed}
    return replace(captured, carried=earlier.carried, bypassed=bypassed)


def _without(config: CompileConfig, layers: tuple[str, ...]) -> CompileConfig:
    """Return the config with more layers left dense."""
    return replace(config, layers={**config.layers, **dict.fromkeys(layers)})
