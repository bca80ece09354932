"""The public operators beside the reference operators: the same bits, by a kernel where there is one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nmcompile import pruning
from nmcompile.api.prune import AcceleratedOperator
from nmcompile.backends.cpu import prune as cpu
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.pruning.operator import BlockOperator
from nmcompile.pruning.transposable import transposable_mask as reference_mask

DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
PATTERNS = {"mvue_one_of_two": ("1:2",), "mvue_pairs": ("2:4",), "mvue_approx": ("2:4",)}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t(),
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "negated": lambda x: torch.complex(x, x).conj().imag if x.dtype in (torch.float32, torch.float64) else x,
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def operator_of(name: str) -> AcceleratedOperator:
    found = getattr(pruning, name)
    assert isinstance(found, AcceleratedOperator)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", pruning.OPERATORS)
def test_public_operators_give_the_bits_of_the_references(name: str, dtype: torch.dtype, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(18, 22).to(dtype))
    for pattern in PATTERNS.get(name, ("1:2", "2:4", "3:5")):
        for dim in (0, 1):
            expected = pruning.OPERATORS[name](x, pattern, dim=dim, generator=generator())
            found = operator_of(name)(x, pattern, dim=dim, generator=generator())
            assert found.equal(expected)
            assert found.stride() == expected.stride()
            out = torch.full_like(x, 9.0).t().contiguous().t()
            assert operator_of(name)(x, pattern, dim=dim, generator=generator(), out=out) is out
            assert out.equal(expected)


@pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)
@pytest.mark.parametrize("name", sorted(cpu.NATIVE))
def test_kernels_run_where_there_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 8)
    expected = pruning.OPERATORS[name](x, "2:4", generator=generator())

    def refuse(*_: object) -> Tensor:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(BlockOperator, "write", refuse)
    assert operator_of(name)(x, "2:4", generator=generator()).equal(expected)


def test_results_have_no_gradient_history_and_inputs_stay() -> None:
    x = torch.randn(8, 8, requires_grad=True)
    before = x.detach().clone()
    found = pruning.greedy(x, "2:4")
    assert not found.requires_grad
    assert x.detach().equal(before)


def test_operators_of_devices_without_kernels_run_the_reference() -> None:
    assert pruning.greedy(torch.empty(8, 8, device="meta"), "2:4").device.type == "meta"


@pytest.mark.parametrize("shape", [(8, 8), (3, 12, 16), (7, 9)], ids=str)
def test_transposable_masks_give_the_bits_of_the_reference(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape)
    for pattern, method in (("2:4", "exact"), ("2:4", "greedy"), ("1:2", "exact")):
        found = pruning.transposable_mask(w, pattern, method=method)
        assert found.equal(reference_mask(w, pattern, method=method))


def test_unknown_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        pruning.nothing  # noqa: B018
