"""Tensors that take the place of others."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


def like(old: Tensor, values: Tensor) -> Tensor:
    """Return a tensor of these values to put in the place of another: with its strides, attributes and tensor hooks.

    It is a parameter if the old one is, and needs a gradient if the old one does.

    Args:
        old: the tensor that is replaced.
        values: a tensor of the same shape that nothing else holds; the result may use its memory.
    """
    if values.stride() != old.stride():
        values = torch.empty_like(old.detach()).copy_(values)
    new = nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values
    for name, value in vars(old).items():
        vars(new).setdefault(name, value)  # a tensor subclass may hold its own values here
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if registered := getattr(old, hooks):
            setattr(new, hooks, OrderedDict(registered))  # a copy: hooks that are added later are of one tensor only
    return new
