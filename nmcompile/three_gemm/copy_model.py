"""Copies of module trees, which share every tensor or none."""

import copy
from collections.abc import Callable

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nmcompile.errors import CaptureError


def share_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree that shares every tensor with it.

    Raises:
        CaptureError: a module cannot be copied; `inplace=True` needs no copy.
    """
    return _copy(model, lambda tensor: tensor)


def own_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree with tensors of its own; one that the tree holds twice stays one.

    Raises:
        CaptureError: a module cannot be copied; `inplace=True` needs no copy.
    """
    return _copy(model, _own)


def _own(tensor: Tensor) -> Tensor:
    """Return a leaf of the same values, without its gradient and hooks."""
    copied = tensor.detach().clone()
    needs = tensor.requires_grad
    return nn.Parameter(copied, needs) if isinstance(tensor, nn.Parameter) else copied.requires_grad_(needs)


def _copy(model: nn.Module, copied: Callable[[Tensor], Tensor]) -> nn.Module:
    # deepcopy takes the objects in its memo for already copied.
    leaves = (leaf for module in model.modules() for leaf in pytree.tree_leaves(vars(module)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    try:
        return copy.deepcopy(model, {id(tensor): copied(tensor) for tensor in tensors})
    except (TypeError, RuntimeError, NotImplementedError, AssertionError) as error:  # FSDP2 raises the last
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}); pass inplace=True to compile the model itself"
        ) from error
