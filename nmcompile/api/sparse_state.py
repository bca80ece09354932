"""The state for exact resumption beside `state_dict()`: masks, step counts, random streams, clips and dense phases."""

import warnings
from math import prod

import torch
from torch import Tensor, nn

from nmcompile.api.pipeline import bind_layers, install_layers, plan_again
from nmcompile.api.state_entries import (
    CLIP,
    CLOCK,
    DENSE,
    DRAW,
    FORMAT,
    STEP,
    check_entries,
    check_entry,
    check_readable,
)
from nmcompile.api.verify import mask_checks
from nmcompile.checks import check_compiled
from nmcompile.config import Phase
from nmcompile.errors import StateError
from nmcompile.ir.plan import DensePhases
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.grid_steps import ActivationStep
from nmcompile.three_gemm.record import RECORD, record_of
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.training.earlier import earlier_layers
from nmcompile.training.find_masks import masks_among
from nmcompile.training.weight_clock import HOLDS

LOADED = "pruning did not pay where the loaded state was decided (CompileConfig.where)"


def sparse_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state that `state_dict()` does not hold, as tensors that safetensors can write.

    Keys: `<weight>.mask` (bool), `<weight>.clock` (int64: optimizer steps, and whether the mask is stale: 0 if not, 1
    by a write, 2 by steps), `<layer>.draw` (int64: backward calls), `<layer>.clip` and `<layer>.output_clip` (float32,
    NaN until calibrated; of quantized inputs and outputs), `<layer>.weight_step` (float64, for each out-feature, of the
    grid that the weight was rounded to when its mask was found; NaN where SAWB finds it), `seed` and `format`; with
    `where="pays"` or `"likely"` also `<layer>.dense_phases` (bool, for the forward, the backward and the update GEMM:
    whether it is left dense).

    Raises:
        StateError: the model is not compiled, or holds several compiled ones with layers of the same name.
    """
    layers = _layers(model)
    for mask in masks_among(layers).values():
        # Look now: the next forward here would see that the weight was written, but the loading model could not.
        mask.look()
    return _state(layers, _dense_phases(model))


def load_sparse_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the result of `sparse_state_dict`, after `load_state_dict`: training continues bit for bit.

    A model that was compiled with `where="pays"` or `"likely"` is planned as the state says, whatever was found here;
    load before it is wrapped (by DDP, FSDP2 or `torch.compile`).

    Warns:
        UserWarning: the state has no `<layer>.weight_step`, as none had at first: SAWB finds the steps then.

    Raises:
        StateError: the model is not compiled, or has no storage yet; or the state is of another format, plan, shape or
            type, or holds a number that is not of its kind, or a mask that breaks the pattern of its layer. Nothing is
            loaded then.
    """
    layers, planned = _layers(model), _dense_phases(model)
    check_readable(state)
    state = _with_steps(state, layers)
    decided = _read_dense_phases(state, planned)
    if decided is not None and planned is not None and not _are_same(decided, planned):
        _replan(model, layers, decided, state)
        layers = list(triples_of(model))
    else:
        _check(state, layers, planned)
    _load(layers, state)


def _state(layers: list[GemmTriple], dense: DensePhases | None) -> dict[str, Tensor]:
    state = {"format": torch.tensor(FORMAT), "seed": torch.tensor(layers[0].stream.seed if layers else 0)}
    for name, mask in masks_among(layers).items():
        state[f"{name}.mask"] = mask.tensor.detach().clone(memory_format=torch.contiguous_format)
        state[f"{name}{CLOCK}"] = torch.tensor([mask.steps, mask.clock.staleness if mask.is_stale else HOLDS])
    for triple in layers:
        state[f"{triple.layer.name}{DRAW}"] = triple.stream.draw.cpu().clone()
        if triple.steps.weight_grid is not None:
            state[f"{triple.layer.name}{STEP}"] = _weight_step(triple)
        for step in triple.steps.activations:
            state[_clip_key(step)] = step.clip.detach().clone()
    for name, reasons in (dense or {}).items():
        state[f"{name}{DENSE}"] = torch.tensor([phase in reasons for phase in Phase])
    return state


def _weight_step(triple: GemmTriple) -> Tensor:
    """Return the step that each row of a layer's weight was rounded to, `(out,)`; NaN where SAWB finds it."""
    step = torch.tensor(torch.nan) if triple.steps.weight is None else triple.steps.weight.detach()
    return step.double().expand(triple.site.layer.rows_shape).reshape(-1).clone()


def _with_steps(state: dict[str, Tensor], layers: list[GemmTriple]) -> dict[str, Tensor]:
    """Return a state with the steps of weights; one from before they were state says nothing of them."""
    quantized = [triple for triple in layers if triple.steps.weight_grid is not None]
    if not quantized or any(key.endswith(STEP) for key in state):
        return state
    warnings.warn(
        "the sparse state was saved before steps of 4-bit weights were a part of it, so they are found from the "
        "weights; save it again with sparse_state_dict",
        stacklevel=3,
    )
    unknown = {
        f"{t.layer.name}{STEP}": torch.full((prod(t.site.layer.rows_shape),), torch.nan).double() for t in quantized
    }
    return state | unknown


def _load_weight_step(triple: GemmTriple, step: Tensor) -> None:
    """Set the step of a weight's grid, one for all rows if there is no other."""
    if step.isnan().any():
        triple.steps.weight = None
    elif triple.steps.weight_dim is None and bool((step == step[0]).all()):
        triple.steps.weight = step[0].clone()
    else:
        triple.steps.weight = step.clone().reshape(triple.site.layer.rows_shape)


def _load(layers: list[GemmTriple], state: dict[str, Tensor]) -> None:
    for name, mask in masks_among(layers).items():
        steps, staleness = (int(value) for value in state[f"{name}{CLOCK}"])
        mask.look()  # also moves it to the weight's device
        mask.tensor.copy_(state[f"{name}.mask"])
        mask.steps, mask.is_resumed = steps, False
        mask.accept_content()
        mask.clock.staleness = staleness
    for triple in layers:
        triple.thaw()
        triple.stream.seed = int(state["seed"])
        triple.stream.draw.copy_(state[f"{triple.layer.name}{DRAW}"])
        if triple.steps.weight_grid is not None:
            _load_weight_step(triple, state[f"{triple.layer.name}{STEP}"])
        for step in triple.steps.activations:
            if not state[_clip_key(step)].isnan():
                step.calibrate(state[_clip_key(step)])


def _read_dense_phases(state: dict[str, Tensor], planned: DensePhases | None) -> DensePhases | None:
    """Return the state's decision for the layers that this model may leave dense; None if a layer has none."""
    if planned is None and any(key.endswith(DENSE) for key in state):
        raise StateError("the sparse state was saved with where='pays' or 'likely'; compile the model with it too")
    keys = {name: f"{name}{DENSE}" for name in planned or {}}
    if any(key not in state for key in keys.values()):
        return None
    for key in keys.values():
        check_entry(key, state[key], torch.zeros(len(Phase), dtype=torch.bool))
    return {name: {p: LOADED for p, gone in zip(Phase, state[key], strict=True) if gone} for name, key in keys.items()}


def _are_same(one: DensePhases, other: DensePhases) -> bool:
    return {name: set(reasons) for name, reasons in one.items()} == {n: set(reasons) for n, reasons in other.items()}


def _replan(model: nn.Module, layers: list[GemmTriple], decided: DensePhases, state: dict[str, Tensor]) -> None:
    root, record = record_of(model)
    done = plan_again(record, decided)
    triples = bind_layers(root, done, 0, earlier_layers(layers))  # the seed is loaded with the rest
    _check(state, list(triples.values()), decided)
    install_layers(root, done, triples)


def _dense_phases(model: nn.Module) -> DensePhases | None:
    records = (module.__dict__[RECORD] for module in model.modules() if RECORD in module.__dict__)
    return next((record.dense_phases for record in records), None)


def _clip_key(step: ActivationStep) -> str:
    return f"{step.layer}.{'output_' if step.row.operand == 'output' else ''}{CLIP}"


def _layers(model: nn.Module) -> list[GemmTriple]:
    check_compiled("model", model)
    layers = list(triples_of(model))
    if not layers and not any(RECORD in module.__dict__ for module in model.modules()):
        raise StateError(f"{type(model).__name__} is not compiled; give a model that nmcompile.compile made")
    if len({triple.layer.name for triple in layers}) < len(set(layers)):
        raise StateError(
            f"{type(model).__name__} holds several compiled models with layers of the same name; save and load the "
            "state of each by itself"
        )
    return layers


def _check(state: dict[str, Tensor], layers: list[GemmTriple], dense: DensePhases | None) -> None:
    check_entries(state, _state(layers, dense))
    for name, mask in masks_among(layers).items():
        for check in mask_checks(state[f"{name}.mask"], mask):
            if check.violations:
                broken = f"in {check.violations} of {check.blocks} blocks"
                raise StateError(
                    f"'{name}.mask' of the sparse state is not {check.pattern} along {check.axis} {broken}, as a "
                    f"{mask.operator} mask of the model is; compile with the mode and config it was saved in"
                )
