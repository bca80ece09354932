"""Training of compiled models: masks that follow the optimizer, and their saved state."""

import importlib
from typing import TYPE_CHECKING, Any

from nmcompile.training.clips import clips as clips
from nmcompile.training.graphed_step import graphed_step as graphed_step
from nmcompile.training.optimizer_hooks import step as step

if TYPE_CHECKING:
    from nmcompile.api import callbacks as callbacks
    from nmcompile.api import recipes as recipes
    from nmcompile.api.sparse_training import SparseTraining as SparseTraining


def __getattr__(name: str) -> Any:
    # These are at the top of the package, which imports this module first.
    if name in ("callbacks", "recipes"):
        return importlib.import_module(f"nmcompile.api.{name}")
    if name == "SparseTraining":
        from nmcompile.api.sparse_training import SparseTraining

        return SparseTraining
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
