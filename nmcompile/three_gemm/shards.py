"""Weights that are split among processes: a layer with a DTensor as weight runs on this process's shard.

A mesh dim may split the weight along its out-features (column-wise), along its in-features (row-wise), or not at all:
the output is then split along features, a partial sum, or split like the input. FSDP2 gathers a weight before the layer
sees it, so only tensor parallelism needs this.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from nmcompile.errors import ConfigError, OperandError
from nmcompile.ir.layers import Layer
from nmcompile.ir.plan import LayerPlan
from nmcompile.sharded import is_sharded, like_shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement, Shard


@dataclass(frozen=True)
class _Split:
    """Placements of the input, its gradient, the bias, and the output for one mesh dim."""

    input: "Placement"
    input_gradient: "Placement"
    bias: "Placement"
    output: "Placement"


class Shards:
    """One call of a layer whose weight is a DTensor.

    Args:
        plan: the layer's plan.
        input: a DTensor on the weight's mesh.
        weight: the weight.

    Raises:
        OperandError: the input is not such a DTensor.
        ConfigError: a layer that cannot run on shards: quantized, or with blocks that straddle them.
    """

    def __init__(self, plan: LayerPlan, input: Tensor, weight: "DTensor") -> None:
        self.layer = plan.layer
        if not is_sharded(input):
            raise OperandError(
                f"layer {self.layer.name!r}: its weight is a DTensor and its input a plain tensor; use "
                "parallelize_module, or give a DTensor"
            )
        self.mesh, self.placements, self.shape = weight.device_mesh, weight.placements, input.shape
        _check(plan, weight)
        self.splits = [
            _split(self.layer, w, x, input.ndim) for w, x in zip(weight.placements, input.placements, strict=True)
        ]

    def take(
        self, input: Tensor, weight: "DTensor", bias: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the local operands; gradients go back to where they belong."""
        from torch.distributed.tensor import Partial

        assert is_sharded(input)
        by_batch = self._by_batch()
        gradients = [Partial() if sums else w for sums, w in zip(by_batch, self.placements, strict=True)]
        placed = input.redistribute(placements=[split.input for split in self.splits])
        x = placed.to_local(grad_placements=[split.input_gradient for split in self.splits])
        if bias is not None:
            assert is_sharded(bias)
            spread = bias.redistribute(placements=[split.bias for split in self.splits])
            sums = zip(by_batch, spread.placements, strict=True)
            bias = spread.to_local(grad_placements=[Partial() if by else place for by, place in sums])
            if not self._adds_bias():
                bias = bias - bias.detach()  # zero, with the gradient of the bias
        mask = None if mask is None else like_shard(mask, weight).to_local()
        return x, weight.to_local(grad_placements=gradients), bias, mask

    @property
    def draw_rank(self) -> int:
        """Return the rank whose keys this layer draws: processes with equal operands have to draw the same keys."""
        return self._first(w.is_replicate() and s.input.is_replicate() for w, s in self._dims())

    @property
    def batch_rank(self) -> int:
        """Return the first of the processes that share this process's batch."""
        return self._first(not by_batch for by_batch in self._by_batch())

    def _dims(self) -> list[tuple["Placement", _Split]]:
        return list(zip(self.placements, self.splits, strict=True))

    def _by_batch(self) -> list[bool]:
        """Return for each mesh dim whether it splits the batch, so gradients of the whole weight have to be summed."""
        return [w.is_replicate() and split.input.is_shard() for w, split in self._dims()]

    def _adds_bias(self) -> bool:
        """Return whether this process adds the bias: of the processes whose outputs are summed, one does."""
        here = zip(self.splits, self._here(), strict=True)
        return all(at == 0 for split, at in here if split.output.is_partial())

    def _first(self, alike: Iterable[bool]) -> int:
        """Return the rank of the first process on this one's mesh dims that are `alike`."""
        here = self._here()
        return int(self.mesh.mesh[tuple(0 if same else at for same, at in zip(alike, here, strict=True))])

    def _here(self) -> Sequence[int]:
        """Return the place of this process on the mesh; processes outside of it do not run the layer."""
        here = self.mesh.get_coordinate()
        assert here is not None
        return here

    def give(self, output: Tensor) -> "DTensor":
        """Return the output of all processes."""
        from torch.distributed.tensor import DTensor

        places = [split.output for split in self.splits]
        if self.layer.kind != "linear":
            return DTensor.from_local(output, self.mesh, places, run_check=False)
        # The sizes are named, since an input may be split unevenly.
        shape = torch.Size((*self.shape[:-1], self.layer.out_features))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(output, self.mesh, places, run_check=False, shape=shape, stride=stride)


def _split(layer: Layer, weight: "Placement", input: "Placement", dims: int) -> _Split:
    from torch.distributed.tensor import Partial, Replicate, Shard

    channels = layer.channel_dim % dims
    if weight.is_shard(layer.out_dim):
        return _Split(Replicate(), Partial(), Shard(0), Shard(channels))
    if weight.is_shard(layer.in_dim):
        return _Split(Shard(channels), Shard(channels), Replicate(), Partial())
    kept = Replicate() if input.is_partial() or input.is_shard(channels) else input
    return _Split(kept, kept, Replicate(), kept)


def _check(plan: LayerPlan, weight: "DTensor") -> None:
    layer = plan.layer
    if any(row.is_quantized for row in plan.rows):
        raise ConfigError(
            f"layer {layer.name!r}: it is quantized, and its weight is split among processes; quantize the model of "
            "nmcompile.finalize, which is whole"
        )
    for dim, count in _parts(weight).items():
        axis = {layer.out_dim: "out", layer.in_dim: "in"}.get(dim)
        if axis is None or layer.kind != "linear":
            raise ConfigError(
                f"layer {layer.name!r}: its weight is split along dim {dim}; tensor parallelism is for linear layers"
            )
        blocks = [1, *(row.pattern.block for row in plan.rows if row.pattern is not None and row.axis == axis)]
        size = layer.weight_shape[dim]
        if size % (count * max(blocks)):
            raise ConfigError(
                f"layer {layer.name!r}: {size} {axis}-features on {count} processes are not a whole number of blocks "
                f"of {max(blocks)} each; leave it dense with CompileConfig(layers={{{layer.name!r}: None}}), or "
                "do not parallelize it"
            )


def _parts(weight: "DTensor") -> dict[int, int]:
    """Return the number of parts that each dim of a DTensor is split into."""
    parts: dict[int, int] = {}
    for size, placement in zip(weight.device_mesh.shape, weight.placements, strict=True):
        if not placement.is_replicate():
            dim = cast("Shard", placement).dim
            parts[dim] = parts.get(dim, 1) * size
    return parts
