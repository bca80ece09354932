"""The random stream of one layer: keys for the pruning operators, counted by backward calls.

A key is drawn from (seed, layer name, rank, draw), so that layers, ranks and micro-batches draw independently, while a
resumed run and a run with other layers frozen draw the same. Global generators are never advanced.

Under tensor parallelism processes share a batch. What they compute alike they have to draw alike, as nothing averages
the gradients of their copies of a weight: `Replicas` says which rank's keys such processes draw with.
"""

import hashlib
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from nmcompile.custom_op import custom_op

LAYERS = 4096  # whose first keys are remembered


OWN_RANK = -1


class Replicas:
    """Shared by the layers of a model: the first of the processes that this process shares its batch with."""

    def __init__(self) -> None:
        self.rank = OWN_RANK


class DrawStream:
    """Yields Philox keys. `draw` (0-d int64, on the device where the layer last ran) is the only state.

    `rank` is set where the layer's weight is a DTensor; any other layer asks `replicas`.
    """

    def __init__(self, seed: int, layer: str, replicas: Replicas | None = None) -> None:
        # torch.initial_seed() is unsigned (any 64 bits in a process that was not seeded); operators take int64.
        self.seed = (seed + 2**63) % 2**64 - 2**63
        self.layer = layer
        self.replicas = replicas or Replicas()
        self.rank: int | None = None
        self.draw = torch.zeros((), dtype=torch.int64, device="cpu")

    def move(self, device: torch.device) -> None:
        """Go on there: keys are made on the device where they are wanted, so that nothing has to wait for a copy."""
        if self.draw.device != device and device.type != "meta":
            # What is made in inference mode could not be advanced outside.
            with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
                self.draw = self.draw.to(device)

    def next_keys(self) -> Tensor:
        """The keys of one backward call, int64 of shape (2,): for the backward GEMM and for the update GEMM."""
        rank = self.replicas.rank if self.rank is None else self.rank
        if not torch.compiler.is_compiling():
            return _next_keys(self.draw, self.seed, self.layer, rank)
        return next_keys(self.draw, self.seed, self.layer, rank)


@custom_op("nmcompile::next_keys", fake=lambda draw: draw.new_empty(2), mutates_args=("draw",))
def next_keys(draw: Tensor, seed: int, layer: str, rank: int) -> Tensor:
    """Keys for the current draw; advances it. A custom operator, so that a compiled step draws anew each time."""
    return _next_keys(draw, seed, layer, rank)


def _next_keys(draw: Tensor, seed: int, layer: str, rank: int) -> Tensor:
    if rank == OWN_RANK:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    keys = _bases(seed, layer, rank, draw.device) + draw
    draw.add_(1)
    return keys


def _bases(seed: int, layer: str, rank: int, device: torch.device) -> Tensor:
    """The keys of draw 0: they stay on a GPU, as a copy from the CPU would wait for it."""
    bases = tuple(_base(seed, layer, rank, phase) for phase in ("backward", "update"))
    return torch.tensor(bases, device="cpu") if device.type == "cpu" else _on_device(bases, device)


@lru_cache(LAYERS)
def _on_device(bases: tuple[int, int], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(bases, device=device)


@lru_cache(2 * LAYERS)
def _base(seed: int, layer: str, rank: int, phase: str) -> int:
    digest = hashlib.sha256(f"{seed}/{layer}/{rank}/{phase}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
