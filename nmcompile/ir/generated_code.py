"""Graph modules whose source is freed together with their code.

fx stores the source of each `recompile` in Python's line cache, and keeps it as long as the process lives.
"""

import linecache
import weakref

from torch import fx
from torch.fx.graph import PythonCode
from torch.fx.graph_module import _loader


class GeneratedModule(fx.GraphModule):
    """A `GraphModule` whose source is freed with its code; tracebacks show the source while the code is alive."""

    def recompile(self) -> PythonCode:
        """Regenerate the code of the graph."""
        generated = super().recompile()
        code = type(self).forward
        weakref.finalize(code, _forget_source, code.__code__.co_filename).atexit = False
        return generated


def _forget_source(file: str) -> None:
    _loader.eval_cache.pop(file, None)
    linecache.cache.pop(file, None)
