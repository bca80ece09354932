"""Training of compiled models: masks that follow the optimizer, and their saved state."""

import importlib
from typing import TYPE_CHECKING, Any

from nmcompile.training.clips import clips as clips
from nmcompile.training.graphed_step import graphed_step as graphed_step
from nmcompile.training.optimizer_hooks import step as step

if TYPE_CHECKING:
    from nmcompile.api import callbacks as callbacks
    from nmcompile.api import recipes as recipes
    from nmcompile.api.monitor import monitor as monitor
    from nmcompile.api.monitor_training import MonitorTraining as MonitorTraining
    from nmcompile.api.sparse_training import SparseTraining as SparseTraining


LATER = {
    "callbacks": "nmcompile.api.callbacks",
    "recipes": "nmcompile.api.recipes",
    "monitor": "nmcompile.api.monitor",
    "MonitorTraining": "nmcompile.api.monitor_training",
    "SparseTraining": "nmcompile.api.sparse_training",
}
"""Modules at the top of the package, which imports this one first: modules, or what a name is looked up in."""


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(LATER[name])
    return module if name in ("callbacks", "recipes") else getattr(module, name)
