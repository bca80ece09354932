"""A forward that is set on a module itself: a copy of its class's own, Accelerate's hook around that, or other code.

torch calls `module.forward`, so a forward on the instance hides that of its class.
"""

import functools
import inspect
from types import MethodType

from torch import nn

GENERATED = "three_gemm_generated"
"""Mark on the forwards that are generated for rewritten modules: a module's copy holds another class's forward."""
HOOK, HOOKED = "_hf_hook", "_old_forward"
"""Attributes in which Accelerate's `add_hook_to_module` keeps the hook and the forward that it wraps."""


def foreign_forward(module: nn.Module) -> str:
    """Return why the class's forward does not determine what the module computes; "" if it does."""
    if forward_slot(module) is None:
        code = module.__dict__["forward"]
        name = getattr(code, "__qualname__", type(code).__name__)
        return f"its forward is set on the instance ({name}); set it after compile, or `del module.forward` before"
    if _is_offloaded(module.__dict__.get(HOOK)):
        return "its weights are offloaded by accelerate; compile before dispatch_model or cpu_offload"
    if HOOK in module.__dict__ and "forward" not in module.__dict__:
        return "its class's forward is hooked by accelerate; remove the hook before compile"
    return ""


def forward_slot(module: nn.Module) -> str | None:
    """Return the attribute of the instance that holds its class's forward.

    Returns:
        `""` if the instance holds none; `"forward"`, or `"_old_forward"` under a hook of Accelerate; None if other code
        replaces forward.
    """
    held = module.__dict__.get("forward")
    if "forward" not in module.__dict__:
        return ""
    if _is_own(module, held):
        return "forward"
    is_hook = isinstance(held, functools.partial) and str(held.func.__module__).startswith("accelerate.")
    return HOOKED if is_hook and _is_own(module, module.__dict__.get(HOOKED)) else None


def change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Give a module another class; if it holds its class's forward, it gets the new one's."""
    slot = forward_slot(module)
    module.__class__ = new
    if slot:
        module.__dict__[slot] = MethodType(new.forward, module)


def wrapper_of_own(module: nn.Module) -> str:
    """Return the name of code on the instance around its class's forward, as of Accelerate's mixed precision, or "".

    Such code would still call the forward of a class that the module no longer has.
    """
    if forward_slot(module) is not None:
        return ""
    held = module.__dict__["forward"]
    inner = inspect.unwrap(getattr(held, "__func__", held))
    return str(getattr(held, "__qualname__", held)) if _is_of_class(module, inner) else ""


def _is_own(module: nn.Module, held: object) -> bool:
    """Return whether something bound to the module is its class's forward."""
    return isinstance(held, MethodType) and held.__self__ is module and _is_of_class(module, held.__func__)


def _is_of_class(module: nn.Module, function: object) -> bool:
    return function is type(module).forward or hasattr(function, GENERATED)


def _is_offloaded(hook: object) -> bool:
    """Return whether a hook of Accelerate loads the weights for each call; several may be chained."""
    return bool(getattr(hook, "offload", False)) or any(map(_is_offloaded, getattr(hook, "hooks", ())))
