"""`compile`: read on from here to follow a model on its way to three GEMMs a layer."""

import gc
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path

import torch
from torch import nn

from nmcompile.api.calibrate import calibrate_reached, check_data
from nmcompile.api.first_rank import of_first_rank
from nmcompile.api.measure_phases import find_dense_phases
from nmcompile.api.permute_channels import permute_channels, put_tensors
from nmcompile.api.pipeline import bind_layers, install_layers, plan_and_lower
from nmcompile.api.predict_phases import find_unlikely_phases, tell_if_slower
from nmcompile.api.request import Model, Request, request_of
from nmcompile.api.revert_layers import revert_layers, score_of
from nmcompile.api.solve_layers import solve_layers
from nmcompile.api.solved_parts import found_clips, put_weights, settle
from nmcompile.api.stops import goes_by_magnitude, mask_name
from nmcompile.api.whole_step import leave_slower_dense
from nmcompile.arguments import Args, Kwargs
from nmcompile.checks import check_call, check_callable, check_kind, check_number, check_path
from nmcompile.config import CompileConfig, Phase
from nmcompile.errors import ConfigError
from nmcompile.ir.protocols import Backend
from nmcompile.three_gemm.copy_model import share_copy
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.record import Compilation, record_of
from nmcompile.training.find_masks import masks_of


def compile(
    model: Model,
    mode: str = "training",
    *,
    args: Args | None = None,
    kwargs: Kwargs | None = None,
    config: CompileConfig | None = None,
    backend: str | Backend = "auto",
    calibration: Iterable[object] | None = None,
    validation: Callable[[nn.Module], float] | None = None,
    max_drop: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Rewrite every conv and linear node of a model into its three GEMMs, pruned according to the paper's Table 1.

    The result has the same parameters, buffers and `state_dict()` keys: an optimizer made before still trains it. Its
    modules are copies of the model's that share every tensor, or with `inplace` the model's own. Masks that change
    weights (`masks="sparsegpt"` or `"admm"`, `refit`) and `permute` put new parameters in the place of those that they
    change, with the same attributes and hooks, unless `inplace` is given: make optimizers after this call.

    A module whose own forward calls `F.linear` or a convolution gets a forward generated from its traced graph. Python
    values that it reads (numbers, flags, globals) are frozen at compile time, tensors and buffers are not. Code that a
    graph cannot represent stays Python, and the report says why: it tests the identity or the type of a value that is
    computed from inputs, for example. With `args`, the model also runs once in eval mode, and a generated forward whose
    results differ from its original's in any bit or class stays Python too.

    Other threads may run models meanwhile, and compile others.

    Args:
        model: a module, a `GraphModule`, an `ExportedProgram`, or a compiled model. A compiled model is planned again,
            except that a layer with a mask stays masked, even if it turns out to be the first or the last, and a mask
            that already meets the new pattern is kept.
        mode: `"training"`, `"inference"`, a row of Table 1 (`"weights"`, `"t-weights"`, `"activations"`,
            `"gradients"`) or `"dense"`, which rewrites everything and prunes nothing.
        args, kwargs: example inputs; with them the whole graph is known even if fx cannot trace the model.
        config: anything finer than the mode.
        backend: `"auto"` (the backends that run here, by the device of the parameters), `"cpu"`, `"triton"`,
            `"cusparselt"`, `"reference"`, or a `Backend`; the reference backend runs the nodes that it does not take.
        calibration: batches for the clips of quantized inputs (see `calibrate`); without them, a clip that an earlier
            compilation found for the same grid is kept. `CompileConfig.masks` and `refit` read them too; masks that an
            earlier compilation found from data are kept without them.
        validation, max_drop: a score, higher is better, and how far it may fall below the plain model's: the layers
            that hurt most are left dense until it does not fall further. Each layer costs one validation.
        checkpoint: a folder for masks that are found from data. Each is saved there when it is found, and a call with
            the same model, data and config goes on where an interrupted one has stopped.
        inplace: edit the given module tree, and write changed weights into its parameters; always so after FSDP2's
            `fully_shard`, whose modules cannot be copied.

    Returns:
        A module of the model's class.

    Raises:
        ConfigError: an unknown mode, pattern, layer name or backend; `args` that are not a tuple; `validation` without
            `max_drop` or the reverse; `where="pays"` or `"likely"` without `args`; masks from data without
            `calibration`; a `checkpoint` of another model, data or config.
        CaptureError: nothing to compile, or the model refuses `args`.
        PreconditionError: a layer named in `config` cannot be pruned as asked.
        BackendUnavailable: the backend asked for cannot run here.
        CalibrationError: calibration data that no mask or clip can be found from.
    """
    check_call(args, kwargs)
    _check_control(validation, max_drop)
    if calibration is not None:
        check_data(calibration)
    if checkpoint is not None:
        check_path("checkpoint", checkpoint)
    check_kind("inplace", inplace, bool, "True or False")
    request = request_of(model, mode, args, kwargs, config, backend)
    # Each step tries the request out on a copy, so a failure leaves the model as it is.
    if request.config.permute:
        request = permute_channels(request)
    if calibration is not None and request.config.reads_data:
        calibration = list(calibration)
        request = find_masks(request, calibration, None if checkpoint is None else _folder(checkpoint))
    if calibration is not None:
        request = find_clips(request, calibration)
    elif request.config.reads_data:
        _check_found(request.config, rewrite(request))
    if validation is not None and max_drop is not None:
        request = control_accuracy(request, validation, max_drop)
    request = leave_dense(request)
    compiled = rewrite(request, inplace)
    if request.config.where == "all":
        tell_if_slower(request, record_of(compiled)[1].program)
    return compiled


def _check_control(validation: object, max_drop: object) -> None:
    """Check the options of accuracy control."""
    if (validation is None) != (max_drop is None):
        raise ConfigError("validation and max_drop go together: a score, and how far it may fall")
    if validation is not None:
        check_callable("validation", validation, "a function that takes a model and returns its score, a number")
        check_number("max_drop", max_drop, Real, 0, math.inf, "how much the score may fall, a number >= 0")


def _folder(checkpoint: str | os.PathLike[str]) -> Path:
    folder = check_path("checkpoint", checkpoint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"checkpoint: {folder} cannot be made a folder ({error.strerror})") from error
    return folder


def _check_found(config: CompileConfig, trial: nn.Module) -> None:
    """Raise if a layer would get a mask of magnitudes, as there are no data and it has no mask found from data."""
    magnitudes = [name for name, mask in masks_of(trial).items() if mask.found is None]
    if magnitudes:
        asked = "refit=True" if config.masks == "magnitude" else f"masks={config.masks!r}"
        raise ConfigError(
            f"CompileConfig({asked}) needs data for {magnitudes[0]!r}; pass calibration=, an iterable of batches"
        )


def find_clips(request: Request, data: Iterable[object]) -> Request:
    """Calibrate a trial and keep its clips; layers that the data does not reach stay dense."""
    trial = rewrite(request)
    settled = {step for step, _ in found_clips(trial, request.solved)}
    if request.solved and all(settled.issuperset(triple.steps.activations) for triple in triples_of(trial)):
        return request  # the search for masks has read and checked the data
    unreached = calibrate_reached(trial, data, settled)
    return request.after(trial, unreached)


def find_masks(request: Request, batches: Sequence[object], checkpoint: Path | None) -> Request:
    """Find masks, and new values of kept weights, from data; layers that the data does not reach stay dense."""
    trial = rewrite(request)
    with torch.inference_mode(False):  # new weights are ordinary tensors
        solved = of_first_rank(lambda: solve_layers(trial, batches, request.config, checkpoint))
    settle(trial, solved)
    reached = {part.weight for part in solved}
    by_data = (one for one in triples_of(trial) if not (one.called and goes_by_magnitude(one.layer)))
    masked = (triple for triple in by_data if triple.mask is not None)
    unreached = [triple.layer.name for triple in masked if mask_name(triple) not in reached]
    return replace(request.after(trial, unreached), solved=solved)


def control_accuracy(request: Request, validation: Callable[[nn.Module], float], max_drop: float) -> Request:
    """Leave the layers dense that hurt the score most, until it falls by `max_drop` at most."""
    names = [triple.layer.name for triple in triples_of(rewrite(request))]
    dense = score_of(share_copy(request.plain), validation)
    reverted = revert_layers(dense, names, lambda layers: rewrite(request.without(layers)), validation, max_drop)
    return replace(request.without(reverted.layers), reverted=reverted)


def leave_dense(request: Request) -> Request:
    """Leave the phases dense that `CompileConfig.where` finds, if it is asked to."""
    if request.config.where == "pays":
        return keep_what_pays(request)
    if request.config.where == "likely":
        return replace(request, dense_phases=find_unlikely_phases(request))
    return request


def keep_what_pays(request: Request) -> Request:
    """Leave the phases dense that pruning does not make faster: of layers timed alone, then of the whole step."""
    trial = rewrite(request)
    dense_phases = find_dense_phases(trial, request.args, request.kwargs)
    return leave_slower_dense(replace(request.after(trial), dense_phases=dense_phases), trial, rewrite)


def rewrite(request: Request, inplace: bool = False) -> nn.Module:
    """Plan and lower the graphs, then change a module tree: a copy, or the model itself. Errors precede the change."""
    if request.solved:
        gc.collect()  # the modules of an earlier trial refer to each other, and hold its masks and weights
    done = plan_and_lower(request)
    target = request.model if inplace else share_copy(request.plain)
    put_tensors(target, request.permuted, inplace)
    put_weights(target, request.solved, _masked(done), inplace)
    triples = bind_layers(target, done, torch.initial_seed(), request.earlier)
    install_layers(target, done, triples)
    return target


def _masked(done: Compilation) -> set[str]:
    """Return the full names of the weights that the plan masks."""
    masked = {plan.layer.name for plan in done.program.plan if plan.find(Phase.FORWARD, "weight")}
    return {site.weight for site in done.program.captured.sites if site.layer.name in masked}
