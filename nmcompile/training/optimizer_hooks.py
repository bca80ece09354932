"""The hooks that tell masks about optimizer steps: one before and one after each step of any `torch.optim` optimizer.

They are global. They also free the cached values of the stepped weights, and unfreeze a frozen model.
"""

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from nmcompile.arguments import Args, Kwargs
from nmcompile.checks import check_compiled
from nmcompile.printable import printable
from nmcompile.sharded import is_sharded, like_shard
from nmcompile.three_gemm.frozen import thaw
from nmcompile.weight_cache import forget

if TYPE_CHECKING:
    from nmcompile.training.masks import WeightMask

live_masks: "weakref.WeakSet[WeightMask]" = weakref.WeakSet()
"""Every mask in the process; masks add themselves."""

_steps_before: "weakref.WeakKeyDictionary[Optimizer, dict[int, int]]" = weakref.WeakKeyDictionary()
"""Number of steps that each mask had noted, by the mask's id, for each optimizer that is making a step."""

_uncounted: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()
"""Optimizers whose present step is counted by the caller."""


@cache
def watch_optimizers() -> None:
    """Register the two hooks, once per process; they look only at live objects of this package."""
    # Dynamo would trace the weight's properties that the hooks read as constants.
    register_optimizer_step_pre_hook(torch.compiler.disable(_before_step))
    register_optimizer_step_post_hook(torch.compiler.disable(_after_step))


def step(model: nn.Module) -> None:
    """Tell a compiled model that an optimizer step was made, for optimizers that are not `torch.optim.Optimizer`s.

    Call it once after each step; the hooks do the same for optimizers of torch.optim.
    """
    check_compiled("model", model)
    note_step(list(model.parameters()))


@contextmanager
def uncounted(optimizer: Optimizer) -> Iterator[None]:
    """Leave it to the caller to count the steps of an optimizer in this context, with `note_step`."""
    _uncounted.add(optimizer)
    try:
        yield
    finally:
        _uncounted.discard(optimizer)


def _before_step(optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    masks = list(_masks_of(held(optimizer)))
    is_inside = _is_inside_another(optimizer)
    _steps_before[optimizer] = {id(mask): mask.notes for mask in masks}
    for mask in masks:
        if mask.was_moved() and is_inside:
            mask.accept_version()  # the optimizer around this one has looked at gradients elsewhere (SAM)
        elif mask.was_moved():
            mask.mark_stale()
    _warn_of_resumption(optimizer, [mask for mask in masks if mask.is_resumed])
    closure = kwargs.get("closure") or next(iter(args[1:]), None)
    if not callable(closure):
        _decay([mask for mask in masks if not mask.is_decayed], optimizer)
        return None
    if isinstance(closure, partial) and closure.func is _evaluate:  # set by an optimizer around this one
        return None
    # The closure computes the gradients.
    evaluate = partial(_evaluate, closure, masks, optimizer)
    return (args, {**kwargs, "closure": evaluate}) if "closure" in kwargs else ((args[0], evaluate, *args[2:]), kwargs)


def _is_inside_another(optimizer: Optimizer) -> bool:
    """Return whether another optimizer is making a step, in which this one is called."""
    others = [one for one in _steps_before if one is not optimizer]
    frame = sys._getframe(1) if others else None
    while frame is not None:  # an optimizer whose step failed is still noted, but no longer called
        if any(frame.f_locals.get("self") is one for one in others):
            return True
        frame = frame.f_back
    return False


def _warn_of_resumption(optimizer: Optimizer, resumed: "Sequence[WeightMask]") -> None:
    """Warn, once per model, if weights and the optimizer's state were loaded, but no sparse state."""
    for mask in resumed:
        mask.is_resumed = False
    states = (optimizer.state.get(weight) for mask in resumed for weight in mask.parameters())
    if any(state and float(state.get("step", 1)) for state in states):
        warnings.warn(
            f"{printable(resumed[0].name)}: its weights were loaded, and its optimizer's state, but no sparse state, "
            "so its mask was recomputed. Sparse training does not resume exactly this way: load the result of "
            "nmcompile.sparse_state_dict after load_state_dict (in trainers SparseTraining does so).",
            stacklevel=4,
        )


def _evaluate(closure: Callable[[], object], masks: "Sequence[WeightMask]", optimizer: Optimizer) -> object:
    """Return the loss, and compute the gradients that the optimizer will see."""
    for mask in masks:
        mask.accept_version()  # after the optimizer's own writes: line searches call closures more than once
    loss = closure()
    _decay(masks, optimizer)
    return loss


def _decay(masks: "Sequence[WeightMask]", optimizer: Optimizer) -> None:
    # If several compilations share a weight, the last one decays it: the others may be waiting for collection.
    decaying = sorted((mask for mask in masks if mask.sr_ste), key=lambda mask: mask.serial)
    for mask in {id(mask.weight()): mask for mask in decaying}.values():
        _add_sr_ste(mask, getattr(optimizer, "grad_scale", None))
    for mask in masks:
        mask.is_decayed = True


def _after_step(optimizer: Optimizer, args: Args, kwargs: Kwargs) -> None:
    before = _steps_before.pop(optimizer, {})
    if optimizer in _uncounted:
        return
    # A GradScaler tells fused optimizers, which are called each time, whether to skip the step.
    found_inf = getattr(optimizer, "found_inf", None)
    note_step(held(optimizer), before, found_inf if isinstance(found_inf, Tensor) else None)


def note_step(
    parameters: Sequence[Tensor],
    before: Mapping[int, int] = MappingProxyType({}),
    found_inf: Tensor | None = None,
) -> None:
    """Count a step, unless an optimizer inside this one did: then the mask has noted more steps than `before`."""
    thaw(parameters)
    for mask in _masks_of(parameters):
        if before.get(id(mask), mask.notes) == mask.notes:
            mask.after_step(found_inf)
        else:
            mask.accept_version()
    forget(parameters)


def held(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that an optimizer steps."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _masks_of(parameters: Sequence[Tensor]) -> "Iterator[WeightMask]":
    held = set(map(id, parameters))
    for mask in list(live_masks):
        if any(id(p) in held for p in mask.parameters()):
            yield mask


@torch.no_grad()
def _add_sr_ste(mask: "WeightMask", scale: Tensor | None) -> None:
    """Add λ (1 - mask) ∘ w to the gradient: the pruned weights decay (Zhou et al. 2021, SR-STE).

    It is added right before the step, so gradient accumulation cannot scale it. `scale` is the factor that a GradScaler
    leaves in gradients for fused optimizers, which divide by it.
    """
    weight = mask.weight()
    if weight is not None and weight.grad is not None:
        kept = like_shard(mask.tensor, weight) if is_sharded(weight) else mask.tensor
        pruned = torch.where(kept, torch.zeros_like(weight), weight)
        # λ times the scale first: the scale alone is infinite in float16.
        factor = mask.sr_ste if scale is None else (mask.sr_ste * scale).to(weight.device)
        weight.grad.add_(pruned * factor)
