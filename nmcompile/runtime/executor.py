"""The choice of what runs the steps: native kernels, or torch where there are none."""

from collections.abc import Sequence

from nmcompile.native import MISSING
from nmcompile.runtime.arena import Arena
from nmcompile.runtime.native import NativeExecutor
from nmcompile.runtime.reference import ReferenceExecutor
from nmcompile.runtime.runtime import Executor
from nmcompile.runtime.steps import Step


def executor_for(steps: Sequence[Step], arena: Arena) -> Executor:
    """Return the executor of this installation."""
    return ReferenceExecutor(steps) if MISSING else NativeExecutor(steps, arena)
