"""The owner of the code that a frame of the stack runs: the model, a library, or the tracer."""

import dis
import sys
from types import CodeType, FrameType

# Modules whose frames only relay a type test; the frame that asks is further up the stack.
RELAYS = {"abc", "_abc", "typing", "_collections_abc", "torch.nn.parameter"}
TRUSTED = ("torch.fx", "torch.overrides", "torch.utils._pytree", "torch.nn.modules.module", "nmcompile.capture")
"""Modules that may ask a proxy anything, since they know that it is a proxy."""
LIBRARIES = {"torch", "nmcompile", *sys.stdlib_module_names}


def is_asker(frame: FrameType | None) -> bool:
    """Return whether the frame that asks something of a proxy is the model's own code."""
    while frame is not None and _module_of(frame) in RELAYS:
        frame = frame.f_back
    return frame is not None and not _module_of(frame).startswith(TRUSTED)


def is_model_code(frame: FrameType) -> bool:
    """Return whether a frame runs code of neither torch nor Python nor this package."""
    return _module_of(frame).split(".")[0] not in LIBRARIES


def is_aside(frame: FrameType | None, trace: CodeType) -> bool:
    """Return whether the frame runs for an import or a finalizer, which can happen anywhere and sees no proxies.

    `trace`: the code that the model's code was called from.
    """
    while frame is not None and frame.f_code is not trace:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def instruction(frame: FrameType) -> str:
    """Return the name of the bytecode instruction that a frame is at."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]]


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))
