"""The exception tree: one line of meaning each.

A message says what went wrong, where (layer name, shape), what was expected and what to do.
"""

import difflib
from collections.abc import Iterable

from nmcompile.printable import printable

LONGEST = 2000  # characters of a message: several names, a reason, and what to do
COMPARED = 200  # characters of a name: how alike two are takes the product of their lengths


class NMCompileError(Exception):
    """The root of every error that nmcompile raises on purpose, with a message of one printable line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message, LONGEST))


class ConfigError(NMCompileError, ValueError):
    """A mode, pattern, option or layer name that does not exist or does not fit."""


class OperandError(NMCompileError, TypeError):
    """A tensor that a pruning operator cannot take: integer, complex, wrong shape or `out`."""


class CaptureError(NMCompileError):
    """A model that cannot be captured: nothing to compile, or it refuses the given `args`."""


class PassError(NMCompileError):
    """A pass could not do its work."""


class PreconditionError(PassError):
    """A pass was given a graph that it does not accept."""


class PostconditionError(PassError):
    """A pass left a graph that breaks the rules; please report it."""


class LoweringError(NMCompileError):
    """A node that no backend has lowered was executed, or a backend refused a node it claimed."""


class BackendUnavailable(NMCompileError):
    """A backend asked for by name is not usable on this machine."""


class LibraryError(NMCompileError, RuntimeError):
    """A call that a native library refused."""


class GradientError(NMCompileError, RuntimeError):
    """A derivative that is not defined here, such as the second derivative of a pruned GEMM."""


class StateError(NMCompileError, ValueError):
    """A saved sparse state that does not fit the compiled model."""


class FileError(NMCompileError, ValueError):
    """A file that is damaged, hostile, or not what its sidecar says."""


class ExportError(NMCompileError):
    """A model that cannot be exported as asked, or a file that cannot be written or does not compute the same."""


class CalibrationError(NMCompileError, ValueError):
    """A quantized input without a clip, or data that gives none."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown `name`: the nearest known name, or else all of them."""
    choices = sorted(known)
    close = difflib.get_close_matches(name[:COMPARED], choices, n=1, cutoff=0.4)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
    return f"known names: {shown}" if shown else "there are none"
