"""Run the graphs of layers node by node, to look at (or replace) what flows through them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from nmcompile.config import Phase
from nmcompile.three_gemm.triple import GemmTriple


@contextmanager
def interpreted(triples: Iterable[GemmTriple], make: Callable[[GemmTriple, Phase], fx.Interpreter]) -> Iterator[None]:
    """Inside, every graph of `triples` runs through the interpreter that `make` gives for it."""
    running = list(triples)
    for triple in running:
        triple.__dict__["run"] = _Run(triple, make)
    try:
        yield
    finally:
        for triple in running:
            del triple.__dict__["run"]


class _Run:
    """Stands in for `GemmTriple.run`."""

    def __init__(self, triple: GemmTriple, make: Callable[[GemmTriple, Phase], fx.Interpreter]) -> None:
        self.triple = triple
        self.make = make

    def __call__(self, phase: Phase, values: dict[str, Tensor | None]) -> Any:
        device = next(v for v in values.values() if v is not None).device.type
        with torch.autocast(device, enabled=False):
            arguments = (values[name] for name in self.triple.placeholders[phase])
            return self.make(self.triple, phase).run(*arguments)
