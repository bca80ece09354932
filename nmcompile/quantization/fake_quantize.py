"""Quantize and dequantize with a straight-through gradient."""

import torch
from torch import Tensor

from nmcompile.quantization.grid import Grid, integers


def fake_quantize(x: Tensor, scale: Tensor | float, grid: Grid) -> Tensor:
    """`scale` times the grid's integer next to `x / scale`.

    The gradient passes straight through where `x` lies inside the grid and is zero outside; the scale gets none.

    Args:
        x: any shape, floating point; arithmetic is in float32, for float64 in float64.
        scale: positive, 0-d or broadcastable to `x`.
        grid: signed or unsigned.

    Returns:
        A tensor of the shape, dtype and strides of `x`. Zero stays zero, NaN stays NaN.

    Raises:
        OperandError: `scale` does not broadcast to the shape of `x`.
    """
    on_grid = integers(x, scale, grid)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inside = torch.clamp(wide, grid.low * torch.as_tensor(scale), grid.high * torch.as_tensor(scale))
    quantized = inside + (on_grid * scale - inside).detach()
    return quantized.to(x.dtype)
