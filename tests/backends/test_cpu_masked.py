"""The masked weight that dense CPU kernels read equals `torch.where` bit for bit."""

import pytest
import torch

from nmcompile.backends.cpu.masked import masked
from nmcompile.ir.operations import apply_mask
from nmcompile.weight_cache import weights_at_rest

WORDS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""Integers as wide as floating-point numbers."""


@pytest.mark.parametrize("dtype", WORDS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, torch.preserve_format], ids=str)
def test_it_is_the_weight_where_the_mask_holds_else_zero(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Also where a NaN, an infinity or a negative zero is pruned, and where the mask lies in memory differently."""
    weight = torch.randn(8, 12, 3, 3).to(dtype)
    weight.view(-1)[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, -1.0, float("nan")])
    mask = torch.rand(weight.shape) > 0.5
    mask.view(-1)[:6] = torch.tensor([False, False, False, False, False, True])
    if layout is torch.preserve_format:
        mask = mask.contiguous(memory_format=torch.channels_last)
    else:
        weight, mask = weight.contiguous(memory_format=layout), mask.contiguous(memory_format=layout)
    before, expected, found = weight.clone(), torch.where(mask, weight, 0.0), masked(weight, mask)
    assert torch.equal(found.view(WORDS[dtype]), expected.view(WORDS[dtype])) and found.stride() == expected.stride()
    assert torch.equal(weight.view(WORDS[dtype]), before.view(WORDS[dtype])) and mask.dtype == torch.bool


def test_the_weight_of_a_frozen_model_is_masked_once() -> None:
    weight, mask = torch.randn(8, 8), torch.rand(8, 8) > 0.5
    with weights_at_rest():
        assert masked(weight, mask) is masked(weight, mask) is apply_mask(weight, mask)


def test_a_large_weight_is_masked_by_several_threads() -> None:
    weight, mask = torch.randn(1025, 517), torch.rand(1025, 517) > 0.5
    assert masked(weight, mask).equal(torch.where(mask, weight, 0.0))
