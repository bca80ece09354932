"""Baselines that the paper compares MVUE with: the rows of its Table 2, and SDGP."""

import torch
from torch import Tensor

from nmcompile.pruning.magnitude import select_by_magnitude
from nmcompile.pruning.minimum_variance import sample
from nmcompile.pruning.operator import BlockOperator
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.selection import Selection

SDGP_EPSILON = 1e-4  # as published (McDanel et al. 2022)


def select_uniform(blocks: Tensor, pattern: NMPattern, u: Tensor) -> Selection:
    """Keep every element with probability N / M, unchanged: the positions floor(((u + j) M) / N), j = 0, ..., N - 1.

    The last one is clamped to M - 1, as u + j may round up to N.
    """
    kept = torch.zeros_like(blocks, dtype=torch.bool)
    index = torch.arange(pattern.block, device=blocks.device).unsqueeze(1)
    for j in range(pattern.n_keep):
        kept |= index == ((u[0] + j) * pattern.block / pattern.n_keep).floor().clamp_(max=pattern.block - 1)
    return Selection(kept)


def select_unbiased(blocks: Tensor, pattern: NMPattern, u: Tensor) -> Selection:
    """Keep the elements of `uniform`, emitted as a (M / N), the constant rounded to the dtype of the arithmetic."""
    return Selection(select_uniform(blocks, pattern, u).mask, blocks * (pattern.block / pattern.n_keep))


def select_biased(blocks: Tensor, pattern: NMPattern, u: Tensor) -> Selection:
    """Keep the elements of `mvue`, unchanged."""
    saturated, sampled, _ = sample(blocks.abs(), pattern.n_keep, u[0])
    return Selection(saturated | sampled)


def rescale_l1(x: Tensor, pruned: Tensor, dim: int) -> Tensor:
    """Multiply kept values by Σ|x| / (Σ|pruned| + 1e-4), per sample and channel.

    For `(samples, channels, *spatial)` pruned along dim 1, the sums run over the spatial dims, as published. For any
    other tensor, such as `(..., tokens, features)` pruned along its last dim, they run along `dim`: the channels of a
    linear layer's token have no positions to sum over, and sums over tokens would mix samples.
    """
    dims = list(range(2, x.dim())) if dim == 1 and x.dim() > 2 else [dim]
    wide = torch.promote_types(x.dtype, torch.float32)
    dense, kept = x.to(wide).contiguous(), pruned.to(wide).contiguous()
    factor = dense.abs().sum(dims, keepdim=True) / (kept.abs().sum(dims, keepdim=True) + SDGP_EPSILON)
    return torch.where(kept != 0, kept * factor, 0.0).to(x.dtype)


uniform = BlockOperator("uniform", select_uniform, draws=1)
unbiased = BlockOperator("unbiased", select_unbiased, draws=1, unbiased=True)
biased = BlockOperator("biased", select_biased, draws=1)
sdgp = BlockOperator("sdgp", select_by_magnitude, rescale=rescale_l1)
