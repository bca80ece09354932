"""A look at the mask of a live weight: a tile of it, and how many elements its blocks keep along both axes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nmcompile.config import Phase
from nmcompile.ir.layers import Layer
from nmcompile.ir.plan import LayerPlan

SIZE = 32  # rows and columns of a tile


@dataclass(frozen=True)
class MaskTile:
    """The mask of a weight in short.

    Args:
        rows: the first out-channels, one text of 0 and 1 each over the first in-channels, at the first kernel position.
        block: M of the pattern N:M.
        kept: by axis, `"in"` and `"out"`, the number of blocks by the count of elements that they keep; an axis that
            the blocks do not divide is missing.
        magnitude: the share of the weight's sum of magnitudes that is kept; 1 for a weight of zeros.
    """

    rows: tuple[str, ...]
    block: int
    kept: Mapping[str, Mapping[int, int]]
    magnitude: float


def tile_of(plan: LayerPlan, weight: Tensor, mask: Tensor) -> MaskTile | None:
    """Return the tile of a layer's mask; None if the plan prunes no weight, or if there are no values (`meta`).

    Args:
        plan: the layer's plan.
        weight, mask: of the layer's weight shape.
    """
    row = plan.find(Phase.FORWARD, "weight") or plan.find(Phase.BACKWARD, "weight")
    if row is None or row.pattern is None or weight.is_meta or not weight.numel():
        return None
    layer, block = plan.layer, row.pattern.block
    matrix = _matrix(layer, mask.detach().bool())
    tile = matrix[:SIZE, :SIZE, 0].int().tolist()
    fits = {"in": layer.fits_forward(row.pattern), "out": layer.fits_backward(row.pattern)}
    kept = {axis: _counts(matrix, dim, block) for dim, axis in ((1, "in"), (0, "out")) if fits[axis]}
    return MaskTile(tuple("".join(map(str, row)) for row in tile), block, kept, _kept_share(weight, mask))


def _matrix(layer: Layer, mask: Tensor) -> Tensor:
    """Return the mask as (out, in, kernel positions)."""
    ordered = mask.movedim((layer.out_dim, layer.in_dim), (0, 1))
    return ordered.reshape(*ordered.shape[:2], -1)


def _counts(matrix: Tensor, dim: int, block: int) -> dict[int, int]:
    sums = matrix.unflatten(dim, (-1, block)).sum(dim + 1)
    values, counts = sums.unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _kept_share(weight: Tensor, mask: Tensor) -> float:
    size = weight.detach().abs().double()
    total = size.sum()
    return 1.0 if total == 0 else float(torch.where(mask.bool(), size, 0.0).sum() / total)
