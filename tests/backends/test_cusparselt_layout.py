"""The order of indices is found from a library's compressed output, and the packing kernel writes that order.

Without a CUDA device the kernel runs in Triton's interpreter.
"""

import importlib.util
import os
from unittest import mock

import pytest
import torch
from torch import Tensor

from nmcompile.backends.cusparselt.layout import find_layout
from nmcompile.backends.cusparselt.operand import Operand, checked_layout, compressed
from nmcompile.backends.triton.layout import empty_sums
from nmcompile.backends.triton.support import KEEP
from nmcompile.pruning import OPERATORS, NMPattern, mask
from nmcompile.pruning.packed import pack, two_of_four
from tests.backends.fake_cusparselt import Compress, FakeLibrary, compress_in_rows

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    # The interpreter must be requested before Triton is imported.
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        from nmcompile.backends.triton.kernels import lines as lines

# Warnings of numpy, with which the interpreter computes, about arithmetic that the reference does silently.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
CPU = torch.device("cpu")


def codes_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return kept values and the codes of groups, `(rows, groups)`."""
    values, indices = pack(matrix, two_of_four(matrix, 1), 1)
    return values, torch.stack([indices & 15, indices >> 4], -1).flatten(1)


def in_bytes(values: Tensor, codes: Tensor) -> Tensor:
    """Return a library's output: values, then the codes in their order, two per byte."""
    pairs = codes.flatten()
    index_bytes = (pairs[0::2] | pairs[1::2] << 4).to(torch.uint8)
    return torch.cat([values.flatten().view(torch.uint8), index_bytes]).view(values.dtype)


def rows_share_bytes(matrix: Tensor) -> Tensor:
    """Order codes in tiles of 64 rows and 8 groups; a byte has the codes of two rows, 8 apart."""
    values, codes = codes_of(matrix)
    rows, groups = codes.shape
    tiles = codes.view(rows // 64, 4, 2, 8, groups // 8, 2, 4)
    return in_bytes(values, tiles.permute(0, 4, 1, 3, 6, 5, 2))


def groups_share_bytes(matrix: Tensor) -> Tensor:
    """Order codes in tiles of 64 rows and 16 groups; a byte has the codes of two neighbours."""
    values, codes = codes_of(matrix)
    rows, groups = codes.shape
    tiles = codes.view(rows // 64, 4, 2, 8, groups // 16, 2, 4, 2)
    return in_bytes(values, tiles.permute(0, 4, 1, 3, 6, 5, 2, 7))


def swizzled(matrix: Tensor) -> Tensor:
    """Order codes in a way that is not a sum over rows and groups: odd rows run backwards."""
    values, codes = codes_of(matrix)
    return in_bytes(values, torch.where(torch.arange(len(codes)).view(-1, 1) % 2 == 1, codes.flip(1), codes))


ORDERS = [rows_share_bytes, groups_share_bytes, compress_in_rows]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packing kernel run on CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("compiled kernels take CUDA tensors")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton asks again at the first launch


@pytest.mark.parametrize(("order", "partner"), [(rows_share_bytes, 8), (groups_share_bytes, 0), (compress_in_rows, 0)])
def test_an_order_is_found(order: Compress, partner: int) -> None:
    layout = find_layout(128, 192, torch.bfloat16, CPU, order)
    assert layout is not None and layout.places.partner == partner
    assert layout.start == 128 * 96 * 2
    # Every byte belongs to exactly one pair.
    lines, blocks = layout.places.lines, layout.places.blocks
    low_lines = [r for r in range(128) if not r & partner]
    low_blocks = blocks if partner else blocks[::2]
    found = (lines[low_lines].view(-1, 1) + low_blocks).flatten()
    assert found.sort().values.equal(torch.arange(layout.start, layout.size, dtype=torch.int32))


def test_another_order_is_not_mistaken_for_one(kernel: None) -> None:
    library = FakeLibrary(swizzled)
    assert checked_layout(library, 64, 64, torch.bfloat16, CPU) is None
    matrix = torch.randn(60, 64, dtype=torch.bfloat16)
    kept = mask(matrix, "2:4", 1)
    padded = torch.zeros(64, 64, dtype=torch.bfloat16)
    padded[:60] = torch.where(kept, matrix, 0.0)
    result = compressed(library, Operand(matrix, 1, kept), 64, 64)
    assert result.equal(swizzled(padded)), "the library's own function runs"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_masked_weight_is_compressed(order: Compress, dim: int, is_transposed: bool, kernel: None) -> None:
    library = FakeLibrary(order)
    matrix = torch.randn(64, 128, dtype=torch.bfloat16)
    kept = mask(matrix, "2:4", 1)
    zeros = torch.where(kept, matrix, 0.0)
    given, flags = (matrix, kept) if dim == 1 else (matrix.t(), kept.t())
    if is_transposed:
        given, flags = given.t().contiguous().t(), flags.t().contiguous().t()
    result = compressed(library, Operand(given, dim, flags), 64, 128)
    assert checked_layout(library, 64, 128, torch.bfloat16, CPU) is not None, "the kernel was not checked"
    assert result.view(torch.uint8).equal(order(zeros).view(torch.uint8))


@pytest.mark.parametrize(
    ("operator", "pattern"), [("mvue", "2:4"), ("mvue", "1:2"), ("mvue_approx", "2:4"), (KEEP, "2:4")]
)
@pytest.mark.parametrize("sizes", [(128, 64), (100, 60), (97, 33)])
def test_a_gradient_is_pruned_and_compressed(sizes: tuple[int, int], operator: str, pattern: str, kernel: None) -> None:
    library = FakeLibrary(rows_share_bytes)
    gradient, key = torch.randn(*sizes, dtype=torch.bfloat16), torch.tensor(11)
    rule = ("mvue", NMPattern.parse("2:4")) if operator == KEEP else (operator, NMPattern.parse(pattern))
    pruned = OPERATORS[rule[0]].prune(gradient, rule[1], 0, key)
    expected = torch.zeros(64, 128, dtype=torch.bfloat16)
    expected[: sizes[1], : sizes[0]] = pruned.t()
    given = Operand(pruned if operator == KEEP else gradient, 0, None, operator, NMPattern.parse(pattern), key)
    result = compressed(library, given, 64, 128)
    assert result.view(torch.uint8).equal(rows_share_bytes(expected).view(torch.uint8))


@pytest.mark.parametrize("order", [rows_share_bytes, swizzled])
@pytest.mark.parametrize(("operator", "pattern"), [("mvue", "2:4"), ("mvue", "1:2"), ("greedy", "2:4")])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((128, 64), torch.bfloat16), ((100, 60), torch.float16), ((97, 33), torch.float32), ((10, 70), torch.bfloat16)],
)
def test_a_gradient_is_summed_before_it_is_pruned(
    sizes: tuple[int, int], dtype: torch.dtype, operator: str, pattern: str, order: Compress, kernel: None
) -> None:
    """Tiles of tokens apart, the last of them partial or of padding alone, or in a pass of its own."""
    gradient, key = torch.randn(*sizes, dtype=dtype), torch.tensor(12)
    given = Operand(gradient, 0, None, operator, NMPattern.parse(pattern), key)
    expected = compressed(FakeLibrary(order), given, 128, 256)
    sums = torch.full_like(empty_sums(gradient), torch.nan)
    assert compressed(FakeLibrary(order), given._replace(sums=sums), 128, 256).equal(expected)
    exact, magnitude = gradient.double().sum(0), gradient.double().abs().sum(0)
    assert bool(((sums.sum(0) - exact).abs() <= sizes[0] * 2.0**-24 * magnitude).all())
