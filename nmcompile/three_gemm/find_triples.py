"""The three-GEMM layers of a compiled model and their masks."""

from collections.abc import Iterable, Iterator

from torch import nn

from nmcompile.three_gemm.modules import ThreeGemm
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.training.masks import WeightMask


def triples_of(model: nn.Module) -> Iterator[GemmTriple]:
    """Every three-GEMM layer of a compiled model."""
    for module in model.modules():
        if isinstance(module, ThreeGemm):
            yield from module.three_gemms.values()


def masks_of(model: nn.Module) -> dict[str, WeightMask]:
    """The masks of a compiled model by the name of their weight."""
    return masks_among(triples_of(model))


def masks_among(triples: Iterable[GemmTriple]) -> dict[str, WeightMask]:
    """The masks that layers have, by the name of their weight."""
    masks = (triple.mask for triple in triples)
    return {mask.name: mask for mask in masks if isinstance(mask, WeightMask)}
