"""Copies of module trees that share every tensor."""

import copy

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nmcompile.errors import CaptureError


def share_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree that shares every tensor with it.

    Raises:
        CaptureError: a module cannot be copied; `inplace=True` needs no copy.
    """
    # deepcopy takes the objects in its memo for already copied.
    leaves = (leaf for module in model.modules() for leaf in pytree.tree_leaves(vars(module)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except (TypeError, RuntimeError, NotImplementedError, AssertionError) as error:  # FSDP2 raises the last
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}); pass inplace=True to compile the model itself"
        ) from error
