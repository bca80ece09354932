"""Products by generated code, compared bit for bit with the same products by compiled loops.

A few lanes run compiled loops, many lanes run generated code (see `kCodeLanes` in row_code.h).
"""

import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nmcompile.backends.cpu.gemm import Geometry, sparse_forward, sparse_update
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.native import INSTRUCTION_SETS
from nmcompile.pruning import OPERATORS, NMPattern

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)

FEW = 16
PATTERN = NMPattern(2, 4)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.new_full((x.shape[0], weight.shape[0]), torch.nan)
    assert sparse_forward(x, weight, None, bias, y, Geometry())
    return y


def pruned(x: Tensor, dim: int) -> Tensor:
    return OPERATORS["greedy"].prune(x, PATTERN, dim, None)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth", [4, 60, 64, 68, 128, 132, 260])
@pytest.mark.parametrize("rows", [1, 23, 24, 49, 100])
@pytest.mark.usefixtures("threads")
def test_many_tokens_give_what_few_do(dtype: torch.dtype, depth: int, rows: int) -> None:
    torch.manual_seed(depth + rows)
    weight, bias = pruned(torch.randn(rows, depth, dtype=dtype), 1), torch.randn(rows, dtype=dtype)
    for tokens in (129, 160, 333):
        x = torch.randn(tokens, depth, dtype=dtype)
        few = [product(part, weight, bias) for part in x.split(FEW)]
        assert product(x, weight, bias).equal(torch.cat(few))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_features_give_what_few_do(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    grad_output, x = pruned(torch.randn(200, 40, dtype=dtype), 0), torch.randn(200, 1100, dtype=dtype)

    def update(x: Tensor) -> Tensor:
        gradient = x.new_full((40, x.shape[1]), torch.nan)
        assert sparse_update(grad_output, x, gradient, Geometry(), "flat", 4)
        return gradient

    assert update(x).equal(torch.cat([update(part) for part in x.split(FEW, 1)], 1))


def test_each_row_keeps_its_places() -> None:
    """All pairs of places in a four, in another order in each row and each block."""
    pairs = torch.combinations(torch.arange(4), 2)
    rows, fours = 48, 40
    chosen = pairs[torch.randint(6, (rows, fours), generator=torch.Generator().manual_seed(3))]
    weight = torch.zeros(rows, fours, 4).scatter_(2, chosen, 1.0).view(rows, -1)
    x = torch.eye(4 * fours).repeat(2, 1)
    assert product(x, weight).equal(weight.t().repeat(2, 1))


def test_copies_of_the_code_are_written_again_for_other_shapes() -> None:
    torch.manual_seed(2)
    weight = pruned(torch.randn(420, 132), 1)  # of more rows than all copies hold
    x = torch.randn(320, 132)
    few = torch.cat([product(part, weight) for part in x.split(FEW)])
    for tokens in (320, 200, 320):
        assert product(x[:tokens], weight).equal(few[:tokens])


def test_denormal_values_count() -> None:
    torch.manual_seed(1)
    weight, x = pruned(torch.randn(16, 64), 1), torch.randn(160, 64)
    x[70] = 1e-42
    few = torch.cat([product(part, weight) for part in x.split(FEW)])
    assert product(x, weight).equal(few) and few[70].ne(0).any()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("tokens", [FEW, 160])
def test_operands_that_are_not_finite_are_left_to_the_dense_kernel(tokens: int, value: float) -> None:
    weight, x = pruned(torch.randn(16, 64), 1), torch.randn(tokens, 64)
    x[tokens // 2, 5] = value
    assert not sparse_forward(x, weight, None, None, x.new_empty(tokens, 16), Geometry())


PRODUCTS = """
import torch
from nmcompile.backends.cpu.gemm import Geometry, sparse_forward

torch.set_num_threads(1)
torch.manual_seed(0)
weight, x = torch.randn(100, 132), torch.randn(300, 132)
weight.unflatten(1, (-1, 4))[..., 1:3] = 0

def is_right():
    y = x.new_empty(300, 100)
    assert sparse_forward(x, weight, None, None, y, Geometry())
    return torch.allclose(y, x @ weight.t(), rtol=1e-4, atol=1e-4)
"""
WRITES = """
def writable_code():
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.split()[1].startswith("rwx")]
    return sum(int(last, 16) - int(first, 16) for first, last in ranges)

before = writable_code()
assert is_right() and writable_code() > before
"""
NO_NEW_CODE = """
import ctypes, mmap
prctl = ctypes.CDLL(None).prctl
refused = prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN
if refused:
    raise SystemExit(3)
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
except PermissionError:
    raise SystemExit(0 if is_right() else 1)
raise SystemExit(2)
"""
IN_A_CHILD = """
import os
assert is_right()
child = os.fork()
right = all([is_right() for _ in range(50)])
if child == 0:
    os._exit(0 if right else 1)
assert right and os.waitpid(child, 0)[1] == 0
"""


def exit_code(program: str) -> int:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(PRODUCTS + program)], check=False).returncode


@pytest.mark.skipif(sys.platform != "linux" or "v4" not in INSTRUCTION_SETS, reason="code is written with AVX-512")
def test_many_lanes_do_run_written_code() -> None:
    assert exit_code(WRITES) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to refuse it")
def test_a_system_that_forbids_written_code_runs_compiled_loops() -> None:
    code = exit_code(NO_NEW_CODE)
    if code == 3:
        pytest.skip("this system cannot be asked to refuse memory that is both written and executed")
    assert code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_process_has_code_of_its_own() -> None:
    assert exit_code(IN_A_CHILD) == 0
