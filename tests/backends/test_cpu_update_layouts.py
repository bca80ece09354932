"""The update GEMM gives the same bits whether it reads an image's channels side by side or transposes its rows."""

import pytest
import torch

from nmcompile.backends.cpu import gemm
from nmcompile.backends.cpu.gemm import Geometry, sparse_update
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.pruning import OPERATORS, NMPattern

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_give_the_same_bits(
    dtype: torch.dtype, stride: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, size = torch.randn(4, 20 * groups, 9, 7, dtype=dtype), ((8 // stride) + 1, (6 // stride) + 1)
    grad_output = OPERATORS["greedy"].prune(torch.randn(4, 24, *size, dtype=dtype), NMPattern(2, 4), 0, None)
    geometry = Geometry((stride, stride), (1, 1), (1, 1), groups)
    found = []
    for together in (False, True):
        monkeypatch.setattr(gemm, "_reads_channels_together", lambda *_, answer=together: answer)
        gradient = x.new_full((24, 20, 3, 3), torch.nan)
        assert sparse_update(grad_output, x, gradient, geometry, "batch", 4)
        found.append(gradient)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("outputs", "inputs", "kernel", "together"),
    [(64, 64, 3, True), (64, 64, 1, False), (64, 8, 3, False), (512, 64, 3, False)],
)
def test_many_positions_and_a_window_repay_the_copy(outputs: int, inputs: int, kernel: int, together: bool) -> None:
    grad_output, grad_weight = torch.empty(4, outputs, 8, 8), torch.empty(outputs, inputs, kernel, kernel)
    assert gemm._reads_channels_together(grad_output, grad_weight, 1) is together
