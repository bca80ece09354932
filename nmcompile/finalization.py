"""The plain model with its pruning made real in the weights."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmcompile.errors import PassError
from nmcompile.ir.modules import RECORD, restore
from nmcompile.ir.operations import apply_mask
from nmcompile.training.masks import WeightMask
from nmcompile.training.state import masks_of

FINALIZED = "_nmcompile_finalized"
"""Under this name a finalized model remembers which weight obeys which pattern, for `verify`."""


@torch.no_grad()
def finalize(compiled: nn.Module) -> nn.Module:
    """The plain model, a copy, whose pruned weights are zero where the current masks say so.

    Raises:
        PassError: a pruned weight is computed in forward (a standardized weight, say), so that no parameter can hold
            its zeros.
    """
    plain = copy.deepcopy(compiled)
    masks = masks_of(plain)
    effective = {name: _effective(plain, mask) for name, mask in masks.items()}
    for module in plain.modules():
        restore(module)
        module.__dict__.pop(RECORD, None)
    for name, weight in effective.items():
        _write(plain, name, weight)
    plain.__dict__[FINALIZED] = _claims(masks)
    return plain


def effective_weight(model: nn.Module, mask: WeightMask) -> Tensor | None:
    """The weight as the forward GEMM reads it; None where it is computed inside a forward."""
    path, _, attribute = mask.name.rpartition(".")
    if mask.is_computed and not parametrize.is_parametrized(model.get_submodule(path), attribute):
        return None
    weight = named_weight(model, mask.name)
    return None if weight is None else apply_mask(weight.detach(), mask.current(weight))


def named_weight(model: nn.Module, name: str) -> Tensor | None:
    """The tensor behind a full name, parametrized weights computed; None if there is none."""
    path, _, attribute = name.rpartition(".")
    try:
        weight = getattr(model.get_submodule(path), attribute, None)
    except AttributeError:
        return None
    return weight if isinstance(weight, Tensor) else None


def _effective(model: nn.Module, mask: WeightMask) -> Tensor:
    weight = effective_weight(model, mask)
    if weight is None:
        raise PassError(
            f"layer {mask.layer.name!r}: its weight is computed in forward, so finalize cannot write zeros into a "
            f"parameter; leave it dense with CompileConfig(layers={{{mask.layer.name!r}: None}})"
        )
    return weight


def _write(model: nn.Module, name: str, weight: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if parametrize.is_parametrized(module, attribute):
        # Without gradients torch would leave a plain tensor instead of a parameter.
        with torch.enable_grad():
            parametrize.remove_parametrizations(module, attribute)
    getattr(module, attribute).copy_(weight)


def _claims(masks: Mapping[str, WeightMask]) -> dict[str, WeightMask]:
    return dict(masks)
