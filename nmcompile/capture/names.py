"""Names of classes, modules and operators, in the form that reports print."""

import torch
from torch import fx, nn

from nmcompile.three_gemm.instance_forward import foreign_forward

DERIVED = "torch.nn.utils.parametrize", "torch.distributed.fsdp._fully_shard"
"""Modules whose classes are derived from the classes of the user's modules."""


def operator_name(node: fx.Node) -> str:
    """Return the name of a function, method or operator, without overload and trailing underscore."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target._schema.name.split("::")[-1]
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name.rstrip("_") if name.strip("_") else name


def summary(error: BaseException) -> str:
    """Return an error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class as its author wrote it, not the one that parametrizations or FSDP2 derive from it."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith(DERIVED))


def is_torch_nn(module: nn.Module) -> bool:
    """Return whether the module's forward is that of a torch.nn class."""
    return own_class(module).__module__.startswith("torch.nn.") and not foreign_forward(module)


def join(module: str, attribute: str) -> str:
    """Return the full name of a module's attribute; the root has no name."""
    return f"{module}.{attribute}" if module else attribute
