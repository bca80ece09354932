"""The Triton kernels against the reference: equal bit for bit, draw for draw.

Without a CUDA device they run in Triton's interpreter, which must be requested before Triton is imported: here.
"""

from unittest import mock

import pytest
import torch
from torch import Tensor

from nmcompile.backends.triton import operators
from nmcompile.pruning import OPERATORS, NMPattern, transposable_mask
from nmcompile.pruning.packed import Packed, pack, two_of_four
from tests.backends.on_triton import BITS, DEVICES, DTYPES, KINDS, PRUNING, assert_same_bits, interpreter, reference
from tests.backends.operands import LAYOUTS, values

with interpreter():
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    import triton.language as tl

    from nmcompile.backends.triton.kernels.blocks import prune_blocks
    from nmcompile.backends.triton.kernels.launch import TYPES
    from nmcompile.backends.triton.kernels.lines import pack_lines, prune_lines
    from nmcompile.backends.triton.kernels.operators import prune
    from nmcompile.backends.triton.kernels.tiles import prune_tiles

    @triton.jit  # type: ignore[untyped-decorator]
    def prune_pairs_with(u, x, out, DTYPE: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
        """Prune pairs 1:2 with given uniform numbers: rare ones, too."""
        block = tl.arange(0, B)
        pruned = prune((tl.load(x + block), tl.load(x + B + block)), (tl.load(u + block),), "mvue", 1, DTYPE)
        tl.store(out + block, pruned[0])
        tl.store(out + B + block, pruned[1])


# Warnings of numpy, with which the interpreter computes, about arithmetic that the reference does silently.
pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

SHAPES = [((5, 9, 13), 1), ((5, 9, 13), 2), ((16, 35), 0), ((3, 64), 1), ((7,), 0)]


def packed_lines(lines: Tensor) -> Packed:
    return pack(lines, two_of_four(lines, 1), 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "pattern"), PRUNING)
def test_blocks_equal_the_reference(operator: str, pattern: str, dtype: torch.dtype, device: str) -> None:
    for index, kind in enumerate(KINDS):
        shape, dim = SHAPES[index]
        x, key = values(shape, kind, dtype, seed=index), torch.tensor(2**62 // 3 * (index - 2))
        out = torch.full_like(x, 7.0, device=device)
        prune_blocks(x.to(device), operator, NMPattern.parse(pattern), dim, key, out)
        assert_same_bits(out, reference(x, operator, pattern, dim, key))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_blocks_of_any_strides_equal_the_reference(layout: str, dim: int, device: str) -> None:
    x, key = LAYOUTS[layout](values((8, 12, 20), "normal", torch.float32, seed=1).to(device)), torch.tensor(2)
    expected = reference(x.cpu(), "mvue", "2:4", dim, key)
    assert_same_bits(prune_blocks(x, "mvue", NMPattern(2, 4), dim, key, torch.empty_like(x)), expected)
    reversed_out = torch.empty(20, 12, 8, device=device).permute(2, 1, 0)
    assert_same_bits(prune_blocks(x, "mvue", NMPattern(2, 4), dim, key, reversed_out), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_value_equals_the_reference(dtype: torch.dtype, device: str) -> None:
    words = torch.randperm(2**16, generator=torch.Generator().manual_seed(3))
    x, key = (words - 2**15).to(torch.int16).view(dtype).view(-1, 16), torch.tensor(4)
    pruned = prune_blocks(x.to(device), "mvue", NMPattern(2, 4), 1, key, torch.empty_like(x, device=device))
    assert_same_bits(pruned, reference(x, "mvue", "2:4", 1, key))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "dim", "kind"),
    [((72, 40), 0, "special"), ((64, 37), 0, "ties"), ((20, 136), 1, "special"), ((20, 72), 1, "sparse")],
)
@pytest.mark.parametrize("operator", ["greedy_by_value", "mvue", "mvue_approx"])
def test_lines_equal_the_reference(
    operator: str, shape: tuple[int, int], dim: int, kind: str, dtype: torch.dtype, device: str
) -> None:
    x, key = values(shape, kind, dtype, seed=5), torch.tensor(-5)
    expected = reference(x, operator, "2:4", dim, key).movedim(dim, 1).contiguous()
    out = torch.full_like(expected, 7.0, device=device)
    assert_same_bits(prune_lines(x.to(device), operator, NMPattern(2, 4), dim, key, out), expected)
    wanted = packed_lines(expected)
    buffers = [torch.full_like(buffer, 7, device=device) for buffer in wanted]
    packed, positions = pack_lines(x.to(device), operator, dim, key, buffers[0], buffers[1])
    assert_same_bits(packed, wanted[0])
    assert positions.cpu().equal(wanted[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "sparse"])
def test_mvue_of_many_pairs_equals_the_reference(kind: str, dtype: torch.dtype, device: str) -> None:
    """Most tiles hold ordinary blocks only (see `two_of_four`); the first one also holds others."""
    x, key = values((64, 256), kind, dtype, seed=11), torch.tensor(12)
    x[:8, :16] *= torch.finfo(dtype).smallest_normal
    x[8:16, :16] *= torch.inf
    for dim in (0, 1):
        expected = reference(x, "mvue", "2:4", dim, key)
        out = torch.full_like(x, 7.0, device=device)
        assert_same_bits(prune_blocks(x.to(device), "mvue", NMPattern(2, 4), dim, key, out), expected)
        wanted = packed_lines(expected.movedim(dim, 1).contiguous())
        buffers = [torch.full_like(buffer, 7, device=device) for buffer in wanted]
        packed, positions = pack_lines(x.to(device), "mvue", dim, key, buffers[0], buffers[1])
        assert_same_bits(packed, wanted[0])
        assert positions.cpu().equal(wanted[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mvue_of_one_of_two_equals_the_reference_where_sums_and_draws_are_extreme(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finfo = torch.finfo(dtype)
    smallest = finfo.smallest_normal * finfo.eps  # which is subnormal
    numbers = [0.0, smallest, 3 * smallest, finfo.smallest_normal, finfo.eps, 1.0, 1 + finfo.eps, 2**12, finfo.max]
    signed = torch.tensor([*numbers, torch.inf, torch.nan], dtype=dtype)
    draws = torch.tensor([0, 1, 2, 2**12, 2**23, 2**24 - 1]) * 2.0**-24
    pairs = torch.cartesian_prod(torch.cat([signed, -signed]), torch.cat([signed, -signed])).t()
    x, u = pairs.repeat_interleave(len(draws), 1), draws.repeat(pairs.shape[1])
    missing = triton.next_power_of_2(len(u)) - len(u)
    x, u = torch.nn.functional.pad(x, (0, missing)), torch.nn.functional.pad(u, (0, missing))
    out = torch.full_like(x, 7.0, device=device)
    words = (t.view(BITS[dtype]) for t in (x.to(device), out))
    prune_pairs_with[(1,)](u.to(device), *words, DTYPE=TYPES[dtype], B=len(u), enable_fp_fusion=False)
    monkeypatch.setattr("nmcompile.pruning.operator.uniforms", lambda *_: u[None])
    assert_same_bits(out, OPERATORS["mvue"].prune(x, "1:2", 0, torch.tensor(0)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pattern", ["1:2", "4:8"])
@pytest.mark.parametrize("dim", [0, 1])
def test_lines_of_other_patterns_equal_the_reference(pattern: str, dim: int, device: str) -> None:
    x, key = values((80, 48), "normal", torch.bfloat16, seed=6), torch.tensor(7)
    expected = reference(x, "mvue", pattern, dim, key).movedim(dim, 1).contiguous()
    out = torch.empty_like(expected, device=device)
    assert_same_bits(prune_lines(x.to(device), "mvue", NMPattern.parse(pattern), dim, key, out), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_equal_the_reference(kind: str, dtype: torch.dtype, device: str) -> None:
    w = values((39, 70), kind, dtype, seed=8)
    mask = transposable_mask(w, "2:4")
    expected = torch.where(mask, w, 0.0)
    out, transposed = torch.empty_like(w, device=device), torch.empty(70, 39, dtype=dtype, device=device)
    found = torch.empty(39, 70, dtype=torch.bool, device=device)
    prune_tiles(w.to(device), out=out, transposed=transposed, mask=found)
    assert found.cpu().equal(mask)
    assert_same_bits(out, expected)
    assert_same_bits(transposed, expected.t().contiguous())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "dims"), [((12, 20), (0, 1)), ((20, 12), (1, 0)), ((8, 12, 3, 2), (0, 1)), ((2, 8, 6, 3), (1, 2))]
)
@pytest.mark.parametrize("is_strided", [False, True])
def test_transposable_masks_equal_the_reference(
    is_strided: bool, shape: tuple[int, ...], dims: tuple[int, int], device: str
) -> None:
    w = values(shape, "normal", torch.float32, seed=4).to(device)
    if is_strided:
        w = w.movedim(dims[0], -1).contiguous().movedim(-1, dims[0])
    with mock.patch.object(operators, "transposable_mask", side_effect=AssertionError("ran the reference")):
        mask = operators.triton_transposable_mask(w, *dims)
    assert mask.stride() == w.stride()
    assert mask.cpu().equal(transposable_mask(w.cpu(), "2:4", dims=dims))


@pytest.mark.parametrize("device", DEVICES)
def test_operators_run_the_kernels(device: str) -> None:
    x, key = values((32, 24), "normal", torch.bfloat16, seed=9), torch.tensor(10)
    expected = reference(x, "mvue", "2:4", 0, key)
    with mock.patch.object(OPERATORS["mvue"].__class__, "prune", side_effect=AssertionError("ran the reference")):
        pruned = operators.triton_prune(x.to(device), "mvue", 2, 4, -2, key)
        lines = operators.triton_prune_lines(x.to(device), "mvue", 2, 4, -2, key)
        packed = operators.triton_pack_lines(x.to(device), "mvue", -2, key)
    assert_same_bits(pruned, expected)
    assert_same_bits(lines, expected.t().contiguous())
    assert_same_bits(packed[0], packed_lines(expected.t()).values)
    out, transposed, mask = operators.triton_prune_tiles(x.to(device).t())
    assert mask.cpu().equal(transposable_mask(x.t(), "2:4"))
    assert_same_bits(out, transposed.cpu().t().contiguous())
