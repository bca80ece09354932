"""Convolutions in integers: a weight on a grid of four bits, packed for the kernels of whole networks.

Sums are exact. They are multiplied by steps in float32 and a bias is added, each rounded, as in `nmcompile.runtime`: so
both give the same numbers, whatever the threads and the instruction set.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from nmcompile.backends.cpu.conv import known_shape, layout_of
from nmcompile.backends.cpu.frozen_layer import FrozenLayer, are_plain
from nmcompile.backends.cpu.gemm import Geometry
from nmcompile.backends.cpu.packed_integers import BITS, GridInput, GridWeight
from nmcompile.native import isa_and_threads, kernels, lend
from nmcompile.spare_memory import empty

SMALL = 2**24  # bytes of an image, whatever its padding
MOST_PADDED = 16  # × an image without padding

Grid = tuple[float, int, int]
"""Step, lowest and highest integer."""


@dataclass(frozen=True)
class ConvGridWeight(GridWeight["kernels.IntegerLayer"]):
    """The weight of a 1-d or 2-d convolution, `(out, in / groups, *kernel)`."""

    geometry: Geometry

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def channels(self) -> int:
        """Return the channels of the input."""
        return self.weight.shape[1] * self.geometry.groups

    @property
    def how(self) -> Hashable:
        return self.bits, self.geometry

    def pack(self, integers: Tensor) -> "kernels.IntegerLayer | None":
        """Return the packed integers; None if a sum of them may not fit into 32 bits."""
        taps, window = self.geometry.kernels(integers).permute(0, 2, 3, 1), self.geometry.window
        if taps.shape[1:].numel() >= kernels.INTEGER_LAYER_DEPTH:
            return None
        ready = taps.to(torch.int8).contiguous()
        return kernels.integer_layer(ready, self.geometry.groups, window.stride, window.dilation, 2**BITS - 1)

    def convolve(self, input: GridInput, bias: Tensor | None, output: Tensor) -> bool:
        """Write X * W + b to `output`, contiguous or channels last; return False if an operand has no such integers."""
        x, grid = input.values, (float(input.step), input.grid.low, input.grid.high)
        packed, is_image = self.packed(), x.shape[1] == self.channels and x.numel() > 0 and output.numel() > 0
        if packed is None or not _is_step(grid[0]) or not is_image:
            return False
        return _convolve(packed, self.geometry, x, grid, self.steps(input), bias, output, is_rounded=True, prunes=False)


class FrozenConv(FrozenLayer):
    """Y = grid(X) * W + b, `(N, C, *spatial)`, channels last if X or W is; with `prunes` grid(X) is pruned 4:8."""

    def __init__(
        self,
        packed: "kernels.IntegerLayer",
        weight: ConvGridWeight,
        input: GridInput,
        bias: Tensor | None,
        prunes: bool,
    ) -> None:
        super().__init__(packed, weight.steps(input), input, bias)
        self.native, self.geometry, self.weight_layout = packed, weight.geometry, layout_of(weight.weight)
        self.prunes = prunes

    def empty(self, input: Tensor) -> Tensor:
        return empty(input, known_shape(layout_of(input), self.weight_layout, self.geometry))

    def fill(self, input: Tensor, output: Tensor) -> bool:
        operands = self.native, self.geometry, input, self.grid, self.steps, self.bias, output
        return _convolve(*operands, is_rounded=False, prunes=self.prunes)


def frozen_conv(weight: ConvGridWeight, input: GridInput, bias: Tensor | None, prunes: bool) -> FrozenConv | None:
    """Return the layer with these operands; None if there is no such kernel, or the weight cannot be packed."""
    if not are_plain(weight, input, bias) or not _is_step(float(input.step)):
        return None
    packed = weight.packed()
    return None if packed is None else FrozenConv(packed, weight, input, bias, prunes)


def _convolve(
    packed: "kernels.IntegerLayer",
    geometry: Geometry,
    input: Tensor,
    grid: Grid,
    steps: Tensor,
    bias: Tensor | None,
    output: Tensor,
    is_rounded: bool,
    prunes: bool,
) -> bool:
    """Write a convolution; return False for a NaN, far more padding than image, or an input that is not rounded yet."""
    x, y = geometry.images(input.detach()), geometry.images(output)
    if not _has_room(x, geometry.window.padding):
        return False
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    shift = None if bias is None else lend(bias.detach().contiguous())
    operands = lend(x), *grid, is_rounded, prunes, geometry.window.padding, lend(steps), shift, lend(y)
    return kernels.convolve_integers(packed, *operands, *isa_and_threads())


def _has_room(x: Tensor, padding: tuple[int, int]) -> bool:
    """Return whether the codes of an image take about as much memory with their padding as without it."""
    samples, channels, height, width = x.shape
    padded = samples * channels * (height + 2 * padding[0]) * (width + 2 * padding[1])
    return padded <= max(SMALL, MOST_PADDED * x.numel())


def _is_step(step: float) -> bool:
    return 0 < step < math.inf
