"""SAWB, statistics-aware weight binning (Choi et al. 2018): the clip from two moments of the weights."""

from numbers import Integral

import torch
from torch import Tensor

from nmcompile.checks import check_floating, check_tensor, described
from nmcompile.errors import ConfigError, OperandError
from nmcompile.quantization.fake_quantize import fake_quantize
from nmcompile.quantization.grid import Grid

COEFFICIENTS = {2: (2.6, 1.71), 3: (6.943, 6.304), 4: (12.035, 12.03), 8: (31.76, 35.04)}
"""(c1, c2) by bits, for zero-aligned grids; for 2, 4 and 8 bits they are the published pairs.

The widely quoted 4-bit pair (12.68, 12.80) belongs to a grid of 16 levels without a zero, which would fill every pruned
position. Likewise the 3-bit pair (7.509, 6.892) belongs to 8 levels, and none is published for the 7 that are used
here: (6.943, 6.304) is the fit of `benchmarks/sawb_fit.py`, whose error is within half a percent of the least on each
of its six laws.
"""


@torch.no_grad()
def sawb_scale(w: Tensor, bits: int, *, dim: int | None = None) -> Tensor:
    """Return the step of the symmetric grid: α / (2^(bits-1) - 1) with α = c1 √E[w²] − c2 E[|w|].

    An α outside [E|w|, max|w|] becomes max|w|, since the fit holds for bell shapes only. Give the *dense* weights: the
    zeros of a mask distort both moments.

    Args:
        w: any shape but empty, floating point. A NaN makes the step NaN and so stays visible.
        bits: 2, 3, 4 or 8.
        dim: the dim of the out-channels for one step each, None for one step.

    Returns:
        Positive, float32 (float64 for float64): 0-d, or of the rank of `w` with size 1 in every dim but `dim`.

    Raises:
        ConfigError: bits without coefficients.
        OperandError: the weight is empty.
    """
    check_floating("w", w)
    if isinstance(bits, bool) or not isinstance(bits, Integral) or bits not in COEFFICIENTS:
        known = ", ".join(map(str, COEFFICIENTS))
        raise ConfigError(f"SAWB has no coefficients for {described(bits)} bits; give one of {known}")
    if dim is not None:
        _check_dim(w, dim)
    if not w.numel():
        raise OperandError(f"a weight of shape {tuple(w.shape)} has no elements and therefore no step")
    wide = w.to(torch.promote_types(w.dtype, torch.float32)).abs()
    dims = [] if dim is None else [d for d in range(w.dim()) if d != dim % w.dim()]
    keep = dim is not None
    mean, largest = wide.mean(dims, keepdim=keep), wide.amax(dims, keepdim=keep)
    c1, c2 = COEFFICIENTS[bits]
    alpha = c1 * wide.square().mean(dims, keepdim=keep).sqrt() - c2 * mean
    alpha = torch.where((alpha >= mean) & (alpha <= largest), alpha, largest)
    step = alpha / Grid(bits, signed=True).high
    return torch.where(step == 0, 1.0, step)


def _check_dim(w: Tensor, dim: object) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int) or not -w.dim() <= dim < w.dim():
        raise OperandError(f"dim is {described(dim)}; give a dim of a weight of shape {tuple(w.shape)}, or None")


def sawb_quantize(w: Tensor, bits: int, *, mask: Tensor | None = None, dim: int | None = None) -> Tensor:
    """Quantize `w` to SAWB's grid where `mask` holds, and zero it elsewhere; the step is that of the dense `w`.

    The gradient passes straight through to the weights that the mask keeps.

    Args:
        w: any shape, floating point.
        bits, dim: as in `sawb_scale`.
        mask: bool, the shape of `w`, or None to keep everything.
    """
    check_floating("w", w)
    if mask is not None:
        check_tensor("mask", mask)
    if mask is not None and mask.shape != w.shape:
        raise OperandError(f"the mask has shape {tuple(mask.shape)}, the weight {tuple(w.shape)}; they must be equal")
    kept = w if mask is None else torch.where(mask, w, 0.0)
    scale = sawb_scale(w.detach(), bits, dim=dim)
    on_grid = fake_quantize(kept.detach(), scale, Grid(bits, signed=True))
    return kept + (on_grid - kept).detach()
