"""A masked tensor equals that of `torch.where` bit for bit, whichever kernel computes it."""

import pytest
import torch

from nmcompile.ir.operations import apply_mask
from nmcompile.native import MISSING
from nmcompile.weight_cache import weights_at_rest

WORDS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""Integers as wide as floating-point numbers."""


@torch.no_grad()
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
    before, expected, found = weight.clone(), torch.where(mask, weight, 0.0), apply_mask(weight, mask)
    assert torch.equal(found.view(WORDS[dtype]), expected.view(WORDS[dtype])) and found.stride() == expected.stride()
    assert torch.equal(weight.view(WORDS[dtype]), before.view(WORDS[dtype])) and mask.dtype == torch.bool


@torch.no_grad()
def test_the_weight_of_a_frozen_model_is_masked_once() -> None:
    weight, mask = torch.randn(32, 32), torch.rand(32, 32) > 0.5
    with weights_at_rest():
        assert apply_mask(weight, mask) is apply_mask(weight, mask)


@torch.no_grad()
def test_a_large_weight_is_masked_by_several_threads() -> None:
    weight, mask = torch.randn(1025, 517), torch.rand(1025, 517) > 0.5
    assert apply_mask(weight, mask).equal(torch.where(mask, weight, 0.0))


def test_gradients_pass_where_the_mask_holds() -> None:
    weight, mask = torch.randn(32, 32, requires_grad=True), torch.rand(32, 32) > 0.5
    apply_mask(weight, mask).sum().backward()
    assert weight.grad is not None and weight.grad.equal(mask.float())


@torch.no_grad()
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_the_native_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask = torch.randn(32, 32), torch.rand(32, 32) > 0.5
    expected = torch.where(mask, weight, 0.0)
    monkeypatch.setattr(torch, "where", lambda *_: pytest.fail("torch.where ran"))
    assert apply_mask(weight, mask).equal(expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "mask"),
    [
        (torch.randn(32, 32), torch.rand(1, 32) > 0.5),
        (torch.randn(32, 1).expand(32, 32), torch.rand(32, 32) > 0.5),
        (torch.arange(1024).view(32, 32), torch.rand(32, 32) > 0.5),
        (torch.randn(32, 32, dtype=torch.complex64).conj().imag, torch.rand(32, 32) > 0.5),
    ],
    ids=["broadcast mask", "expanded", "integers", "negated"],
)
def test_what_the_kernel_does_not_take_is_masked_too(x: torch.Tensor, mask: torch.Tensor) -> None:
    assert apply_mask(x, mask).equal(torch.where(mask, x, 0.0))
