"""Models that are compiled, run, inspected and dropped, many times: nothing of them stays with the process."""

import copy
import gc
import linecache
import sys
from collections import Counter
from contextvars import copy_context
from functools import _lru_cache_wrapper
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import nmcompile
from nmcompile.backends.shared import choose_kernel
from nmcompile.config import CompileConfig
from nmcompile.ir.choice import Choice

MODES = ("training", "weights", "inference")
WINDOWS = 4
"""The number of windows of cycles. Caches fill in the first one; a leak grows in all the others, and noise does not."""
MARGIN = 2  # objects of a type, entries of a registry, megabytes; each kind of cycle comes three times in a window
STATM = Path("/proc/self/statm")
X = torch.randn(4, 8)


def fresh_model() -> nn.Module:
    """A model with classes of its own, as a cell of a notebook makes them each time that it runs."""

    class Projection(nn.Linear):
        pass

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    return nn.Sequential(Projection(8, 8), nn.ReLU(), Head())


def cycle(number: int) -> None:
    mode = MODES[number % len(MODES)]
    compiled = nmcompile.compile(
        fresh_model(),
        mode,
        args=(X,) if number % 2 else None,
        config=CompileConfig(ends="sparse"),
        calibration=[X] if mode == "inference" else None,
    )
    if mode == "inference":
        with torch.no_grad():
            compiled.eval()(X)
    else:
        optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
        copy.deepcopy(compiled)(X).sum().backward()
        compiled(X).sum().backward()
        optimizer.step()
    assert "sparse" in str(nmcompile.inspect(compiled))


def registry_sizes() -> Counter[str]:
    """The sizes of all containers and caches on the modules of the package, and of Python's and torch's own."""
    sizes = Counter({"modules": len(sys.modules), "context variables": len(copy_context())})
    sizes["sources"], sizes["fx's sources"] = len(linecache.cache), len(fx.graph_module._loader.eval_cache)
    for name, module in list(sys.modules.items()):
        for key, value in vars(module).items() if name.startswith("nmcompile.") else ():
            if isinstance(value, _lru_cache_wrapper):
                sizes[f"{name}.{key}"] = value.cache_info().currsize
            elif hasattr(type(value), "clear") and hasattr(type(value), "__len__"):
                sizes[f"{name}.{key}"] = len(value)
    return sizes


def sizes() -> Counter[str]:
    """The registries, the objects by type, and the resident megabytes where the system tells them."""
    gc.collect()
    found = registry_sizes()
    found.update(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
    found["megabytes"] = int(STATM.read_text().split()[1]) * 4096 // 2**20 if STATM.exists() else 0
    return found


@pytest.mark.parametrize("cycles", [18, pytest.param(125, marks=pytest.mark.slow)])
def test_dropped_models_leave_nothing_behind(cycles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Large GEMMs are measured, and keep packed weights; these are small, and no clock shall decide.
    monkeypatch.setattr(choose_kernel, "SMALL", 1)
    monkeypatch.setattr(choose_kernel, "measure", lambda *_: (Choice("sparse", "the test asks for it"), True))
    seen = []
    for _ in range(WINDOWS):
        for number in range(cycles):
            cycle(number)
        seen.append(sizes())
    growth = [after - before for before, after in pairwise(seen)]
    least = {name: min(one[name] for one in growth) for name in growth[0]}
    assert {name: count for name, count in least.items() if count > MARGIN} == {}
