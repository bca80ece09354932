"""Recorders of the kernels that a function launches: a CUDA graph, or a stand-in where there is no GPU."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Recorder(Protocol):
    """A recorder of kernels."""

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """Run a function that is going to be captured, and return its result."""

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        """Record what a function launches, without computing it; return the tensor of its result."""

    def replay(self) -> None:
        """Launch what was captured: its result is computed anew."""


class CudaRecorder:
    """A CUDA graph, captured on the stream that runs the warm-up."""

    def __init__(self, device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream(device)

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        # Other threads, such as one that pins batches, may go on meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        self._graph.replay()
