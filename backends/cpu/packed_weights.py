"""Packed weights that are kept between calls, while a layer runs without gradients."""

from torch import Tensor

from nmcompile.native import kernels
from nmcompile.weight_cache import WeightCache, is_cacheable

Packs = list["kernels.PackedSparse | None"]
"""The packed operands of the GEMMs that a layer's groups are; empty before the first of them runs."""

_kept: WeightCache[Packs] = WeightCache()


def kept_packs(weight: Tensor, mask: Tensor | None, groups: int = 1) -> Packs | None:
    """Where the packed forms of a weight are kept; None where the weight is about to change."""
    return _kept.get(weight, (mask,), groups, list) if is_cacheable(weight, mask) else None


def forget_packs(weight: Tensor | None) -> None:
    """Free what is kept of a weight, if anything is: the dense kernel was found to be faster."""
    _kept.forget(weight)
