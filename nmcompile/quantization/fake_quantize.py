"""Quantization and dequantization with a straight-through gradient."""

import torch
from torch import Tensor

from nmcompile.autograd_context import AutogradContext
from nmcompile.checks import check_floating, check_kind
from nmcompile.quantization.grid import Grid, integers


def fake_quantize(x: Tensor, scale: Tensor | float, grid: Grid) -> Tensor:
    """Round `x` to the grid: return `scale` times the grid's integer nearest to `x / scale`.

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
    check_floating("x", x)
    check_kind("grid", grid, Grid, "a Grid, as in Grid(4, signed=True)")
    result: Tensor = _StraightThrough.apply(x, scale, grid)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    # x + (quantized - x).detach() would be simpler, but off the grid by a rounding error.
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, scale: Tensor | float, grid: Grid) -> Tensor:
        on_grid = (integers(x, scale, grid) * scale).to(x.dtype)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((x >= grid.low * scale) & (x <= grid.high * scale))
        return on_grid

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad, 0.0), None, None
