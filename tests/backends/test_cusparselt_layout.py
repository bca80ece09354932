"""The order of indices is found from a library's compressed output, and the packing kernel writes that order.

Without a CUDA device the kernel runs in Triton's interpreter.
"""

import importlib.util
import os
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nmcompile.backends.cusparselt.layout import find_layout
from nmcompile.backends.cusparselt.operand import Operand, checked_layout, compressed
from nmcompile.backends.cusparselt.product import Product
from nmcompile.backends.cusparselt.support import Sizes
from nmcompile.backends.triton.layout import empty_sums
from nmcompile.backends.triton.support import KEEP
from nmcompile.pruning import OPERATORS, NMPattern, mask
from nmcompile.pruning.packed import pack, two_of_four
from tests.backends.fake_cusparselt import Compress, FakeLibrary, compress_in_rows, pruned

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
    return torch.cat([values.flatten().view(torch.uint8), index_bytes])


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


def padded_to_tiles(matrix: Tensor, filler: int = 0x44) -> Tensor:
    """Order codes as `rows_share_bytes`, in whole tiles: the last one of a depth that ends inside it is filled up."""
    values, codes = codes_of(matrix)
    missing = -codes.shape[1] % 8
    tiles = F.pad(codes, (0, missing), value=filler & 15).view(len(codes) // 64, 4, 2, 8, -1, 2, 4)
    return in_bytes(values, tiles.permute(0, 4, 1, 3, 6, 5, 2))


def padded_at_random(matrix: Tensor) -> Tensor:
    """Fill up with other bytes in each call, as a library would that leaves them as they are."""
    content = padded_to_tiles(matrix)
    return torch.cat([content, torch.randint(256, (16,), dtype=torch.uint8)])


def past_the_end(matrix: Tensor) -> Tensor:
    """Order codes by rows, with the first row near the end: a sum over rows and groups lies outside."""
    values, codes = codes_of(matrix)
    codes[[0, -2], 2:] = codes[[-2, 0], 2:]
    return in_bytes(values, codes)


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
    assert layout.filler is None
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


@pytest.mark.parametrize("order", [swizzled, past_the_end, padded_at_random, partial(padded_to_tiles, filler=0xEE)])
def test_other_orders_are_refused(order: Compress) -> None:
    assert find_layout(64, 80, torch.bfloat16, CPU, order) is None


@pytest.mark.parametrize("depth", [16, 80, 96])
@pytest.mark.parametrize("order", [compress_in_rows, padded_to_tiles, partial(padded_to_tiles, filler=0)])
def test_depths_of_a_part_of_a_tile_have_a_layout(order: Compress, depth: int, kernel: None) -> None:
    library, ends_whole = FakeLibrary(order), depth % 32 == 0
    layout = checked_layout(library, 64, depth, torch.bfloat16, CPU)
    assert layout is not None and (layout.filler is None) == (ends_whole or order is compress_in_rows)
    matrix, key = torch.randn(depth, 60, dtype=torch.bfloat16), torch.tensor(5)
    result = compressed(library, Operand(matrix, 0, operator="mvue", key=key), 64, depth)
    padded = F.pad(OPERATORS["mvue"].prune(matrix, "2:4", 0, key).t(), (0, 0, 0, 4)).contiguous()
    assert result.equal(order(padded))


@pytest.mark.parametrize("depth", [48, 80])
def test_a_depth_with_a_layout_is_not_padded(depth: int, kernel: None) -> None:
    library, sparse, dense = FakeLibrary(), pruned(depth, 64, dim=0).bfloat16(), torch.randn(depth, 8).bfloat16()
    result = Product(library, Operand(sparse, 0), dense, by_depth=True).multiply()
    assert result is not None
    torch.testing.assert_close(result, dense.t() @ sparse)
    assert set(library.functions.sizes) == {Sizes(64, depth, 8)}


def test_a_depth_without_a_layout_is_padded(kernel: None) -> None:
    def order(matrix: Tensor) -> Tensor:
        return compress_in_rows(matrix) if matrix.shape[1] % 64 == 0 else swizzled(matrix)

    library, sparse, dense = FakeLibrary(order), pruned(80, 64, dim=0).bfloat16(), torch.randn(80, 8).bfloat16()
    result = Product(library, Operand(sparse, 0), dense, by_depth=True).multiply()
    assert result is not None
    torch.testing.assert_close(result, dense.t() @ sparse)
    assert set(library.functions.sizes) == {Sizes(64, 128, 8)}


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
    assert result.equal(order(zeros))


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
    assert result.equal(rows_share_bytes(expected))


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
