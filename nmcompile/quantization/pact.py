"""PACT (Choi et al. 2018): activations clipped at a learned value, then quantized."""

import torch
from torch import Tensor

from nmcompile.autograd_context import AutogradContext
from nmcompile.checks import check_floating
from nmcompile.errors import OperandError
from nmcompile.quantization.grid import Grid, integers

SMALLEST = 256 * torch.finfo(torch.float32).tiny  # the step, up to 255 times smaller, is still a normal number


def positive_clip(clip: Tensor) -> Tensor:
    """Return |clip| as at least float32, or a tiny positive number for zero: gradient steps may lead a clip anywhere.

    dy/dclip is −1 below zero, else 1, also at zero: an optimizer can raise a clip of zero.
    """
    check_floating("clip", clip)
    wide = clip.to(torch.promote_types(clip.dtype, torch.float32))
    return torch.where(wide < 0, -wide, wide) + SMALLEST  # which rounds to |clip| from about 1e-28 on


def pact_quantize(x: Tensor, clip: Tensor, bits: int) -> Tensor:
    """Clip `x` to [0, clip] and round it to 2^bits − 1 steps.

    dy/dx is 1 inside [0, clip] and 0 outside; dy/dclip is 1 where x >= clip, else 0. `positive_clip` replaces a clip
    that is not positive.

    Args:
        x: any shape, floating point.
        clip: 0-d.
        bits: 2 to 8.

    Returns:
        A tensor of the shape, dtype and strides of `x`.

    Raises:
        OperandError: the clip is not 0-d.
        ConfigError: bits outside 2 to 8.
    """
    check_floating("x", x)
    check_floating("clip", clip)
    if clip.dim():
        raise OperandError(f"the clip has shape {tuple(clip.shape)}; PACT has one clip for a tensor, give it 0-d")
    result: Tensor = _Pact.apply(x, positive_clip(clip), Grid(bits, signed=False))  # type: ignore[no-untyped-call]
    return result


class _Pact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, clip: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, clip)
        scale = clip / grid.high
        return (integers(x, scale, grid) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, clip = ctx.saved_tensors
        above = x >= clip
        return torch.where((x >= 0) & ~above, grad, 0.0), _sum(torch.where(above, grad, 0.0)).to(clip), None


def _sum(x: Tensor) -> Tensor:
    """Return the sum in at least float32: a sum of many half-precision gradients would overflow."""
    return x.sum(dtype=torch.promote_types(x.dtype, torch.float32))
