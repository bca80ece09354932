"""The random stream of one layer: keys for the pruning operators, counted by backward calls.

A key is drawn from (seed, layer name, rank, draw). So layers, ranks and micro-batches draw independently, while a
resumed run and a run with other layers frozen draw the same. Global generators are never advanced.

Under tensor parallelism processes share a batch. For values that they all compute they must draw the same keys, as
nothing averages the gradients of their copies of a weight: `Replicas` says which rank's keys such processes draw.
"""

import hashlib
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from nmcompile.custom_op import custom_op

LAYERS = 4096  # layers whose first keys are cached
IS_DISTRIBUTED = dist.is_available()

OWN_RANK = -1


class Replicas:
    """The first of the processes that share this process's batch; shared by the layers of a model."""

    def __init__(self) -> None:
        self.rank = OWN_RANK


class DrawStream:
    """A source of Philox keys. `draw` (0-d int64, on the device where the layer last ran) is the only state.

    `rank` is set if the layer's weight is a DTensor; any other layer asks `replicas`.
    """

    def __init__(self, seed: int, layer: str, replicas: Replicas | None = None) -> None:
        # torch.initial_seed() is unsigned (any 64 bits in a process that was not seeded); operators take int64.
        self.seed = (seed + 2**63) % 2**64 - 2**63
        self.layer = layer
        self.replicas = replicas or Replicas()
        self.rank: int | None = None
        self.draw = torch.zeros((), dtype=torch.int64, device="cpu")

    def move(self, device: torch.device) -> None:
        """Move to a device: keys are made on the device that uses them, so nothing has to wait for a copy."""
        if torch.compiler.is_dynamo_compiling():
            make_bases(self.seed, self.layer, self._rank(), device)
        if self.draw.device != device and device.type != "meta":
            # A tensor made in inference mode could not be advanced outside of it.
            with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
                self.draw = self.draw.to(device)

    def next_keys(self) -> Tensor:
        """Return the keys of one backward call, int64 of shape (2,): for the backward GEMM and for the update GEMM."""
        return next_keys(self.draw, self.seed, self.layer, self._rank())

    def _rank(self) -> int:
        return self.replicas.rank if self.rank is None else self.rank


@custom_op("nmcompile::next_keys", fake=lambda draw: draw.new_empty(2), mutates_args=("draw",))
def next_keys(draw: Tensor, seed: int, layer: str, rank: int) -> Tensor:
    """Return keys for the current draw, and advance it. A custom operator, as it has to draw in each compiled step."""
    keys = _bases(seed, layer, rank, draw.device) + draw
    draw.add_(1)
    return keys


def make_bases(seed: int, layer: str, rank: int, device: torch.device) -> bool:
    """Make what `next_keys` reads while a step is compiled: memory that stays must not be one of a CUDA graph."""
    if device.type != "meta":
        _bases(seed, layer, rank, device)
    return True


# Dynamo calls it, and traces nothing. `torch.compiler.assume_constant_result` sets this mark too, but imports Dynamo.
setattr(make_bases, "_dynamo_marked_constant", True)  # noqa: B010 - functions declare no attributes


def _bases(seed: int, layer: str, rank: int, device: torch.device) -> Tensor:
    """Return the keys of draw 0: they stay on a GPU, as a copy from the CPU would wait for it."""
    if rank == OWN_RANK:
        rank = dist.get_rank() if IS_DISTRIBUTED and dist.is_initialized() else 0
    return _bases_of_rank(seed, layer, rank, device)


@lru_cache(LAYERS)
def _bases_of_rank(seed: int, layer: str, rank: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([_base(seed, layer, rank, phase) for phase in ("backward", "update")], device=device)


def _base(seed: int, layer: str, rank: int, phase: str) -> int:
    digest = hashlib.sha256(f"{seed}/{layer}/{rank}/{phase}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
