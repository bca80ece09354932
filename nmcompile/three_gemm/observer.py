"""The only access to values inside a compiled layer: an observer runs the layer's graphs in its place."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmcompile.config import Phase
from nmcompile.errors import StateError

if TYPE_CHECKING:
    from nmcompile.three_gemm.absorbed_norm import AbsorbedNorm
    from nmcompile.three_gemm.triple import GemmTriple

Values = Mapping[str, Tensor | None]
"""Operands of a graph by the names of its placeholders."""
Results = tuple[Tensor | None, ...]


class Observer:
    """A runner of one layer, and of the batch norm that it absorbs, while it is set on the layer.

    It changes nothing by default: a subclass overrides a method to look at, or to replace, operands and results. It may
    run a layer that is not calibrated yet. `run_eagerly` is `run`, hidden from tracing by `torch.compile`.
    """

    def __init__(self, triple: "GemmTriple") -> None:
        self.triple = triple
        self.run_eagerly: Callable[[Phase, Values], Results] = torch.compiler.disable(self.run)

    def run(self, phase: Phase, values: Values) -> Results:
        """Run a graph of the layer."""
        return self.triple.run_graph(phase, values, self.triple.graphs[phase])

    def run_norm(self, norm: "AbsorbedNorm", input: Tensor) -> Tensor:
        """Run the norm that the layer absorbs."""
        return norm.run_absorbed(input)


@contextmanager
def observing(triples: Iterable["GemmTriple"], make: "Callable[[GemmTriple], Observer]") -> Iterator[None]:
    """Run each layer through the observer that `make` returns for it, inside this context.

    Raises:
        StateError: a layer has an observer already.
    """
    observers = {triple: make(triple) for triple in triples}
    for triple in observers:
        if triple.observer is not None:
            raise StateError(
                f"layer {triple.layer.name!r} is observed already; do not call calibrate, compare, verify(step=...) or "
                "export while another one of them runs the model"
            )
    for triple, observer in observers.items():
        triple.observer = observer
    try:
        yield
    finally:
        for triple in observers:
            triple.observer = None
