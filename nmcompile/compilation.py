"""What a compiled model remembers of how it came about."""

from dataclasses import dataclass

from torch import nn

from nmcompile.accuracy import Reverted
from nmcompile.errors import StateError
from nmcompile.ir.modules import RECORD
from nmcompile.ir.program import Program


@dataclass(frozen=True)
class Compilation:
    """Kept on the root of a compiled model.

    Args:
        program: with its graphs lowered.
        mode: that was asked for.
        reverted: what accuracy control decided, if it was asked to.
    """

    program: Program
    mode: str
    reverted: Reverted | None = None


def record_of(compiled: nn.Module) -> tuple[nn.Module, Compilation]:
    """The compiled model, which DDP or torch.compile may wrap, and its record.

    Raises:
        StateError: the model is not compiled.
    """
    for module in compiled.modules():
        if RECORD in module.__dict__:
            return module, module.__dict__[RECORD]
    raise StateError(f"{type(compiled).__name__} is not compiled; use nmcompile.analyze to see what compile would do")
