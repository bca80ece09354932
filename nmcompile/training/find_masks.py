"""Lookup of the masks of a compiled model."""

from collections.abc import Iterable

from torch import nn

from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.training.masks import WeightMask


def masks_of(model: nn.Module) -> dict[str, WeightMask]:
    """Return the masks of a compiled model by the name of their weight."""
    return masks_among(triples_of(model))


def masks_among(triples: Iterable[GemmTriple]) -> dict[str, WeightMask]:
    """Return the masks of the given layers, by the name of their weight."""
    masks = (triple.mask for triple in triples)
    return {mask.name: mask for mask in masks if isinstance(mask, WeightMask)}
