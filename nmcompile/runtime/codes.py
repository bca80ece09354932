"""Codes with their meaning: an image, and a table of the float32 value that each code stands for.

An operator on each element changes the table alone. It is the operator of torch that the module runs, so what the codes
stand for stays equal to the module's values bit for bit.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from nmcompile.export.deployed_layer import DeployedActivation
from nmcompile.quantization import Grid, integers
from nmcompile.runtime.steps import CODES, Image

aten = torch.ops.aten
# Each rounds once, or as often in a vector as alone, so the result does not depend on where an element lies.
ELEMENTWISE = frozenset({
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default,
    aten.clamp_max.default, aten.leaky_relu.default, aten.neg.default, aten.abs.default, aten.hardswish.default,
    aten.hardsigmoid.default, aten.threshold.default, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor,
    aten.div.Scalar,
})  # fmt: skip


@dataclass(frozen=True)
class Codes:
    """An activation.

    Args:
        image: its codes, from 0 to `len(values) - 1`.
        values: float32 `(codes,)`.
        shape: the shape of the activation in torch.
        channel_dim: the dim of channels or features.
        step: the step of the grid that the values come from.
    """

    image: Image
    values: Tensor
    shape: tuple[int, ...]
    channel_dim: int
    step: Tensor

    @property
    def is_planar(self) -> bool:
        """Return whether the pixels of the image are those of `(samples, channels, height, width)`."""
        return len(self.shape) == 4 and self.channel_dim == 1

    @property
    def rises(self) -> bool:
        """Return whether a larger code stands for no smaller value."""
        return bool((self.values.diff() >= 0).all())

    def multiples(self) -> Tensor | None:
        """Return the integers that the step is multiplied by; None if a value is no multiple of it."""
        found = torch.round(self.values / self.step)
        return found.long() if torch.equal(found * self.step, self.values) else None

    def table(self, wanted: DeployedActivation) -> Tensor:
        """Return the codes of another grid, uint8 `(codes,)`."""
        grid = wanted.grid
        assert grid is not None
        return (integers(self.values, step_of(wanted), grid) - grid.low).to(torch.uint8)

    def mapped(self, node: fx.Node) -> "Codes":
        """Return the codes after an elementwise operator."""
        args = [self.values if isinstance(arg, fx.Node) else arg for arg in node.args]
        values: Tensor = node.target(*args, **node.kwargs)  # type: ignore[operator]
        return replace(self, values=values + 0.0)  # a zero has no sign

    def trimmed(self) -> tuple["Codes", int]:
        """Return the codes without those at both ends that stand for one value, and how many are left out below."""
        first, last = self.values[0], self.values[-1]
        low = int((self.values == first).long().cumprod(0).sum()) - 1
        high = len(self.values) - int((self.values.flip(0) == last).long().cumprod(0).sum())
        return replace(self, values=self.values[low : max(low, high) + 1].clone()), low


def is_elementwise(node: fx.Node) -> bool:
    """Return whether a node computes each element of its only tensor by itself, by an operator that tables may do."""
    return node.target in ELEMENTWISE and len(node.all_input_nodes) == 1


def step_of(wanted: DeployedActivation) -> Tensor:
    """Return the step of a grid, 0-d float32."""
    assert wanted.scale is not None
    return torch.tensor(wanted.scale, dtype=torch.float32)


def values_on(wanted: DeployedActivation) -> Tensor:
    """Return the values of a grid's codes, as `to_grid` computes them."""
    grid = wanted.grid
    assert grid is not None
    return torch.arange(grid.low, grid.high + 1, dtype=torch.float32) * step_of(wanted)


def image_of(shape: tuple[int, ...], channel_dim: int) -> Image | None:
    """Return an image for an activation `(samples, channels, height, width)` or `(..., features)`; None for others."""
    if channel_dim == len(shape) - 1:
        return Image(torch.Size(shape[:-1]).numel(), 1, 1, shape[-1])
    if len(shape) != 4 or channel_dim != 1:
        return None
    samples, channels, height, width = shape
    return Image(samples, height, width, channels)


def is_identity(table: Tensor) -> bool:
    return torch.equal(table.long(), torch.arange(len(table)))


def prunes_codes(wanted: DeployedActivation, channels: int) -> bool:
    """Return whether pruning an activation is pruning its codes 4:8: zero is their lowest, and blocks are whole."""
    pattern, grid = wanted.pattern, wanted.grid
    is_known = pattern is not None and (pattern.n_keep, pattern.block) == (4, 8)
    return is_known and grid == Grid(grid.bits, signed=False) and channels % 8 == 0 if grid is not None else False


def full(table: Tensor) -> Tensor:
    """Return a table with an entry for every byte."""
    return torch.cat([table, table.new_zeros(CODES - len(table))])
