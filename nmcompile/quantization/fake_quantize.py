"""Quantize and dequantize with a straight-through gradient."""

from typing import Any

import torch
from torch import Tensor

from nmcompile.quantization.grid import Grid, integers


def fake_quantize(x: Tensor, scale: Tensor | float, grid: Grid) -> Tensor:
    """`scale` times the grid's integer next to `x / scale`.

    The gradient passes straight through where `x` lies inside the grid and is zero outside; what the grid clips moves a
    scale that asks for a gradient (PACT).

    Args:
        x: any shape, floating point; arithmetic is in float32, for float64 in float64.
        scale: positive, 0-d or broadcastable to `x`.
        grid: signed or unsigned.

    Returns:
        A tensor of the shape, dtype and strides of `x`. Zero stays zero, NaN stays NaN.

    Raises:
        OperandError: `scale` does not broadcast to the shape of `x`.
    """
    result: Tensor = _StraightThrough.apply(x, scale, grid)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    # x + (quantized - x).detach() would be simpler, and off the grid by a rounding error.
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | float, grid: Grid) -> Tensor:
        on_grid = (integers(x, scale, grid) * scale).to(x.dtype)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x > grid.high * scale, x < grid.low * scale)
            ctx.scale, ctx.grid = scale, grid
        return on_grid

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        above, below = ctx.saved_tensors
        grad_scale = None
        if ctx.needs_input_grad[1]:
            clipped = torch.where(above, grad * ctx.grid.high, torch.where(below, grad * ctx.grid.low, 0.0))
            grad_scale = clipped.to(torch.promote_types(grad.dtype, torch.float32)).sum_to_size(ctx.scale.shape)
        return torch.where(above | below, 0.0, grad), grad_scale, None
