"""Blocks of elements, checked against explicit index arithmetic."""

from collections import defaultdict
from collections.abc import Callable
from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

from nmcompile.ir.grouping import grouped

Index = tuple[int, ...]
BLOCK = 4
LINEARS = [(8, 6), (8, 3, 6), (3, 4, 6), (2, 4, 2, 6)]
CONVS = [(8, 6, 3), (8, 4, 3, 2), (6, 4, 2, 4), (4, 4, 2, 1, 3), (3, 8, 8)]


def position(index: Index, shape: Index) -> int:
    """Return the rank of an index in row-major order."""
    return sum(i * prod(shape[d + 1 :]) for d, i in enumerate(index))


def linear_flat(index: Index, shape: Index) -> tuple[Index, int]:
    """Order tokens as they come; one line per feature."""
    return index[-1:], position(index[:-1], shape[:-1])


def conv_flat(index: Index, shape: Index) -> tuple[Index, int]:
    """Order samples, and in each the pixels; one line per channel."""
    return index[1:2], position((index[0], *index[2:]), (shape[0], *shape[2:]))


def batch(index: Index, shape: Index) -> tuple[Index, int]:
    """Order samples at one position."""
    return index[1:], index[0]


def linear_channels(index: Index, shape: Index) -> tuple[Index, int]:
    return index[:-1], index[-1]


def conv_channels(index: Index, shape: Index) -> tuple[Index, int]:
    return (index[0], *index[2:]), index[1]


Line = Callable[[Index, Index], tuple[Index, int]]
"""Line on which an element lies, and its position on the line."""


def expected_blocks(shape: Index, line: Line) -> set[tuple[int, ...]]:
    """Return the blocks as lists of elements in order; an element's name is its rank in the tensor."""
    blocks: dict[tuple[Index, int], dict[int, int]] = defaultdict(dict)
    for index in product(*map(range, shape)):
        key, place = line(index, shape)
        blocks[key, place // BLOCK][place % BLOCK] = position(index, shape)
    return {tuple(members[i] for i in sorted(members)) for members in blocks.values()}


def blocks_of(x: Tensor, axis: str, channel_dim: int) -> set[tuple[int, ...]]:
    view, dim, _ = grouped(x, axis, channel_dim, BLOCK)
    lines = view.movedim(dim, -1).flatten(0, -2).tolist()
    return {tuple(line[i : i + BLOCK]) for line in lines for i in range(0, len(line), BLOCK)}


CASES: list[tuple[Index, str, int, Line]] = [
    *((shape, "flat", -1, linear_flat) for shape in LINEARS),
    *((shape, "auto", -1, linear_flat) for shape in LINEARS),
    *((shape, "batch", -1, batch) for shape in LINEARS),
    *((shape, "channels", -1, linear_channels) for shape in LINEARS),
    *((shape, "flat", 1, conv_flat) for shape in CONVS),
    *((shape, "auto", 1, batch if shape[0] % BLOCK == 0 else conv_flat) for shape in CONVS),
    *((shape, "batch", 1, batch) for shape in CONVS),
    *((shape, "channels", 1, conv_channels) for shape in CONVS),
]


def name(value: object) -> str:
    """Return a name that is the same in every process."""
    return str(getattr(value, "__name__", value))


@pytest.mark.parametrize(("shape", "axis", "channel_dim", "line"), CASES, ids=name)
def test_blocks_hold_consecutive_elements_of_the_contraction(
    shape: Index, axis: str, channel_dim: int, line: Line
) -> None:
    x = torch.arange(prod(shape)).view(shape)
    assert blocks_of(x, axis, channel_dim) == expected_blocks(shape, line)


@pytest.mark.parametrize(("shape", "axis", "channel_dim", "line"), CASES, ids=name)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_way_back(shape: Index, axis: str, channel_dim: int, line: Line, transposed: bool) -> None:
    x = torch.arange(prod(shape)).view(shape)
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if transposed else x
    view, _, restore = grouped(x, axis, channel_dim, BLOCK)
    assert torch.equal(restore(view), x)
    assert torch.equal(restore(view * 3), x * 3)
