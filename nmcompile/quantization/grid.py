"""Grids: the integers that a quantized tensor can hold."""

import sys
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from nmcompile.checks import check_floating, check_kind, check_number
from nmcompile.errors import OperandError

TINIEST = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Grid:
    """Zero-aligned integers: [-(2^(bits-1) - 1), 2^(bits-1) - 1] if signed, [0, 2^bits - 1] if not.

    A signed grid omits the lowest two's complement value to be symmetric. So the zeros of a pruned weight stay zeros,
    and its zero-point is 0, which sparse integer kernels need.

    Raises:
        ConfigError: bits outside 2 to 8.
    """

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        check_number("bits of a grid", self.bits, Integral, 2, 8, "2 to 8 bits")
        check_kind("signed", self.signed, bool, "True or False")

    @property
    def high(self) -> int:
        return int(2 ** (self.bits - self.signed)) - 1

    @property
    def low(self) -> int:
        return -self.high if self.signed else 0

    def __str__(self) -> str:
        return f"{'s' if self.signed else 'u'}{self.bits}"


def integers(x: Tensor, scale: Tensor | float, grid: Grid) -> Tensor:
    """Return the grid's integer nearest to `x / scale`, ties to even, in the dtype of the arithmetic.

    Args:
        x: any shape, floating point.
        scale: the step between two grid points, positive, 0-d or broadcastable to `x`.
        grid: the integers to round and clamp to.

    Returns:
        A tensor of the shape of `x`, float64 for float64 and else float32. A NaN stays one.

    Raises:
        OperandError: `scale` does not broadcast to the shape of `x`.
    """
    check_floating("x", x)
    check_kind("grid", grid, Grid, "a Grid, as in Grid(4, signed=True)")
    if not isinstance(scale, Tensor):
        check_number(
            "scale", scale, Real, TINIEST, sys.float_info.max, "a positive number, or a tensor that broadcasts to x"
        )
    elif not _broadcasts(scale, x):
        raise OperandError(
            f"the scale has shape {tuple(scale.shape)}, x {tuple(x.shape)}; give one scale, or one that broadcasts to x"
        )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.clamp(torch.round(wide / scale), grid.low, grid.high)


def absorbed_step(step: Tensor, gain: Tensor) -> Tensor:
    """Return each channel's step after it absorbs a norm's gain: `step` × |gain|, or `step` where that would vanish.

    Runtimes divide by steps: a channel with gain 0, or next to it, holds zeros and keeps its step.

    Args:
        step: 0-d or `(channels,)`, floating point.
        gain: `(channels,)`, of any sign.

    Raises:
        OperandError: the two do not fit each other.
    """
    check_floating("step", step)
    check_floating("gain", gain)
    if not _broadcasts(step, gain):
        raise OperandError(f"step has shape {tuple(step.shape)}, gain {tuple(gain.shape)}; give one step, or one each")
    absorbed = step * gain.abs()
    return torch.where(absorbed >= TINIEST, absorbed, step)


def _broadcasts(small: Tensor, large: Tensor) -> bool:
    """Return whether `small` broadcasts to the shape of `large`."""
    if small.dim() > large.dim():
        return False
    sizes = zip(reversed(small.shape), reversed(large.shape), strict=False)
    return all(size in (1, wanted) for size, wanted in sizes)
