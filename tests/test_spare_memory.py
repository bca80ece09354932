"""Large results reuse the memory of dropped ones, and only of those."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from nmcompile.backends.cpu.conv import conv_weight_gradient
from nmcompile.backends.cpu.gemm_call import GemmCall
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.linear import linear_forward, linear_weight_gradient
from nmcompile.backends.cpu.prune import cpu_prune
from nmcompile.ir.choice import Choice
from nmcompile.native import kernels
from nmcompile.spare_memory import LARGE, empty_like

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)

STATM = Path("/proc/self/statm")
ELEMENTS = LARGE // torch.float32.itemsize
RESIDENT = """
import mmap
from pathlib import Path
import torch
from nmcompile.spare_memory import LARGE, empty_like

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

"""
BOUNDED = """
empty_like(torch.empty(4 * LARGE)).fill_(1)
before = resident()
larger = empty_like(torch.empty(5 * LARGE)).fill_(1)  # does not fit what the first has left
assert resident() - before < 8 * LARGE and larger.nbytes == 20 * LARGE
"""
SHRUNK = """
first, other = (empty_like(torch.empty(size)).fill_(1) for size in (4 * LARGE, LARGE))
before = resident()
del first, other
middle = empty_like(torch.empty(2 * LARGE)).fill_(2)
assert resident() - before < LARGE
again = empty_like(torch.empty(4 * LARGE))
assert again[0] == 1 and again[-1] == 0  # its last pages made room for the one in the middle
again.fill_(3)
assert resident() - before < 5 * LARGE and middle.eq(2).all()
"""
BORROWED = """
from nmcompile.backends.cpu.gemm import Geometry, sparse_update
dy, x, dw = torch.zeros(8192, 2048), torch.ones(8192, 64), torch.ones(2048, 64)
empty_like(torch.empty(3 * LARGE)).fill_(1)
before = resident()
assert sparse_update(dy, x, dw, Geometry(), "auto", 4) and not dw.any()
assert resident() - before < 4 * LARGE  # the packed gradient takes 40 MB, and each thread some while it multiplies
"""


def test_memory_goes_on_when_nobody_holds_it() -> None:
    x = torch.zeros(ELEMENTS)
    first = empty_like(x).fill_(1)
    place = first.data_ptr()
    view = first[5:7]
    del first
    second = empty_like(x).fill_(2)
    assert second.data_ptr() != place and view.tolist() == [1, 1]
    del view
    third = empty_like(x).fill_(3)
    assert third.data_ptr() == place
    assert second.eq(2).all() and third.eq(3).all()


@pytest.mark.skipif(not STATM.exists(), reason="only Linux tells how much memory is resident")
@pytest.mark.parametrize("script", [BOUNDED, SHRUNK, BORROWED], ids=["bounded", "shrunk", "borrowed"])
def test_a_process_keeps_no_more_than_it_used_at_once(script: str) -> None:
    subprocess.run([sys.executable, "-c", RESIDENT + script], check=True)


def test_blocks_of_all_sizes_keep_their_values() -> None:
    random = Random(0)
    held: dict[int, Tensor] = {}
    for step in range(200):
        if len(held) > random.randrange(20):
            del held[random.choice(list(held))]
        held[step] = kernels.memory(int(2 ** random.uniform(0, 23))).fill_(step)
        assert all(block.eq(number).all() for number, block in held.items())


@pytest.mark.parametrize("is_linear", [True, False], ids=["linear", "conv"])
def test_spare_memory_is_not_held_for_weight_gradients(is_linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GemmCall, "run", lambda self, empty, fill, dense: (empty(), Choice("sparse", "wanted here")))
    weight = torch.empty(LARGE // 4, 4) if is_linear else torch.empty(LARGE // 4, 4, 1, 1)
    dy, x = (torch.empty(4, channels, *(1, 1)[: weight.dim() - 2]) for channels in weight.shape[:2])
    if is_linear:
        gradient = linear_weight_gradient(dy, x, False, "auto", 4, "slot")
    else:
        gradient = conv_weight_gradient(dy, x, weight, [1, 1], [0, 0], [1, 1], 1, "auto", 4, "slot")
    assert gradient.shape == weight.shape
    assert gradient.untyped_storage().resizable() and not empty_like(gradient).untyped_storage().resizable()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_is_as_torch_has_it(dtype: torch.dtype) -> None:
    for x in (
        torch.empty(2, 3, 8, LARGE // 32, dtype=dtype).to(memory_format=torch.channels_last),
        torch.empty(LARGE // 64, 64, dtype=dtype).t(),
        torch.nn.Parameter(torch.empty(LARGE, dtype=dtype)),
        torch.empty(5, dtype=dtype),
        torch.empty(0, dtype=dtype),
    ):
        found, expected = empty_like(x), torch.empty_like(x, requires_grad=False)
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), dtype)
        assert not found.requires_grad and not found._is_view() and found.data_ptr() % dtype.itemsize == 0


def test_large_results_are_traced() -> None:
    x, weight = torch.randn(1024, 8), torch.randn(LARGE // 4096, 8)
    weight.unflatten(1, (-1, 4))[..., 1:3] = 0
    run = torch.compile(lambda x: linear_forward(x, weight, None, None, False, "large"), backend="aot_eager")
    assert run(x).shape == (1024, LARGE // 4096)


def test_large_results_keep_their_values() -> None:
    x = torch.randn(ELEMENTS // 64, 64)
    first = cpu_prune(x, "greedy", 2, 4, 1)
    second = cpu_prune(-x, "greedy", 2, 4, 1)
    assert first.equal(-second)
