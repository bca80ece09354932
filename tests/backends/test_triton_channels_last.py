"""Pruning across the order of the blocks' numbers, as in channels-last images: the kernel equals the reference."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from nmcompile.pruning import NMPattern
from tests.backends.on_triton import DEVICES, DTYPES, KINDS, PRUNING, assert_same_bits, interpreter, reference
from tests.backends.operands import values

with interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    from nmcompile.backends.triton.kernels import blocks, channels_last

# Warnings of numpy, with which the interpreter computes, about arithmetic that the reference does silently.
pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

SHAPES = [
    (8, 16, 4, 4),
    (6, 18, 3, 5),  # odd positions, a partial block of samples, channels that four do not divide
    (4, 136, 2, 3),  # more channels than a program takes side by side
    (3, 40, 9),
    (2, 24, 2, 3, 2),
]


@pytest.fixture(autouse=True)
def launches() -> Iterator[mock.Mock]:
    """Count the launches of the kernel."""
    with mock.patch.object(blocks, "prune_channels_last", wraps=channels_last.prune_channels_last) as launch:
        yield launch


def channels_last_image(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    samples, channels, *spatial = shape
    return values((samples, *spatial, channels), kind, dtype, seed=len(kind)).to(device).movedim(-1, 1)


def prune(x: Tensor, operator: str, pattern: str, dim: int, key: Tensor) -> Tensor:
    out = torch.full_like(x, 7.0)
    assert out.stride() == x.stride()
    return blocks.prune_blocks(x, operator, NMPattern.parse(pattern), dim, key, out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("operator", "pattern"), PRUNING)
def test_images_equal_the_reference_along_samples_channels_or_positions(
    operator: str, pattern: str, shape: tuple[int, ...], device: str, launches: mock.Mock
) -> None:
    index = PRUNING.index((operator, pattern)) + SHAPES.index(shape)
    x = channels_last_image(shape, KINDS[index % len(KINDS)], DTYPES[index % len(DTYPES)], device)
    operand, dim = ((x, 0), (x, 1), (x.transpose(0, 1).flatten(1), 1))[index % 3]
    key = torch.tensor(2**61 // 3 * (index - 2))
    assert_same_bits(prune(operand, operator, pattern, dim, key), reference(operand.cpu(), operator, pattern, dim, key))
    launches.assert_called_once()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_number_equals_the_reference(dtype: torch.dtype, kind: str, device: str) -> None:
    x, key = channels_last_image((8, 32, 5, 3), kind, dtype, device), torch.tensor(-4)
    for pattern in ("1:2", "2:4"):
        assert_same_bits(prune(x, "mvue", pattern, 0, key), reference(x.cpu(), "mvue", pattern, 0, key))


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_of_64_bits_equal_the_reference(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels_last, "needs_int64", lambda *_: True)
    x, key = channels_last_image((8, 32, 5, 3), "normal", torch.bfloat16, device), torch.tensor(5)
    for dim in (0, 1):
        assert_same_bits(prune(x, "mvue", "2:4", dim, key), reference(x.cpu(), "mvue", "2:4", dim, key))


@pytest.mark.parametrize("device", DEVICES)
def test_dims_in_any_order_equal_the_reference(device: str, launches: mock.Mock) -> None:
    """The fast dim may be the first, and others may lie between it and the last."""
    x, key = channels_last_image((4, 16, 6, 3), "normal", torch.float32, device), torch.tensor(6)
    for order, dim in (((1, 2, 0, 3), 2), ((2, 1, 0, 3), 0), ((0, 1, 3, 2), 3)):
        operand = x.permute(order)
        assert_same_bits(prune(operand, "mvue", "2:4", dim, key), reference(operand.cpu(), "mvue", "2:4", dim, key))
    assert launches.call_count == 3
