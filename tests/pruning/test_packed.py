"""2:4 tensors without their zeros."""

import pytest
import torch

from nmcompile.errors import OperandError
from nmcompile.pruning import mask
from nmcompile.pruning.packed import pack, packed_shapes, two_of_four, unpack


def test_indices_are_two_bits_each_in_increasing_order() -> None:
    """Groups that keep (0, 3) and (1, 2), then one that keeps (2, 3), without a neighbour."""
    x = torch.tensor([9.0, 0, 0, 8, 0, 7, 6, 0, 0, 0, 5, 4])
    packed = pack(x, x != 0, 0)
    assert packed.values.tolist() == [9, 8, 7, 6, 5, 4]
    assert packed.indices.tolist() == [0b10_01_11_00, 0b11_10]


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_unpack_gives_the_pruned_tensor(dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(4, 12, 8, dtype=dtype)
    kept = mask(x, "2:4", dim=dim)
    packed = pack(x, kept, dim)
    assert (packed.values.shape, packed.indices.shape) == packed_shapes(tuple(x.shape), dim % 3)
    assert packed.values.is_contiguous() and packed.indices.is_contiguous()
    assert unpack(packed, dim).equal(torch.where(kept, x, 0.0))


def test_what_is_not_2_of_4_cannot_be_packed() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(OperandError, match="not a multiple of 4"):
        pack(x, x > 0, 1)
    with pytest.raises(OperandError, match="does not keep 2 of every 4"):
        pack(x, x > 100, 0)


def test_groups_with_few_non_zeros_keep_their_first_zeros() -> None:
    x = torch.tensor([[0.0, 1, 0, 2, 0, 0, 3, 0, 0, -0.0, 0, 0]])
    kept = [0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0]
    assert two_of_four(x, 1).tolist() == [[bool(one) for one in kept]]
    assert two_of_four(x.t(), 0).flatten().tolist() == [bool(one) for one in kept]
    assert unpack(pack(x, two_of_four(x, 1), 1), 1).equal(x)
