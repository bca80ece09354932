import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmcompile.pruning import NMPattern, mvue
from nmcompile.pruning.minimum_variance import sample, select_mvue

PATTERNS = ["1:2", "2:4", "4:8", "1:4", "3:4", "2:5", "7:8", "1:16", "5:16"]
EDGES = [0.0, 2.0**-24, 0.5 - 2.0**-24, 0.5, 1 - 2.0**-23, 1 - 2.0**-24]


def apply(block: Tensor, pattern: str, u: Tensor) -> Tensor:
    """Apply `mvue` to columns with given uniform numbers."""
    kept, values = select_mvue(block, NMPattern.parse(pattern), u.unsqueeze(0))
    assert values is not None
    return torch.where(kept, values, 0.0)


def written_out(block: np.ndarray, n_keep: int, u: np.floating) -> np.ndarray:
    """Compute the definition for one block, step by step in NumPy scalars of the block's dtype."""
    real = block.dtype.type
    a = [abs(value) for value in block]
    nonzero = [i for i, value in enumerate(a) if value > 0]
    if len(nonzero) <= n_keep:
        return block
    rest, remaining = list(range(len(a))), n_keep
    for _ in range(n_keep):
        total = real(0)
        for i in rest:
            total = total + a[i]
        joining = [i for i in rest if a[i] > 0 and a[i] * real(remaining) >= total]
        if not joining:
            break
        rest = [i for i in rest if i not in joining]
        remaining -= len(joining)
    result = np.where([i in rest for i in range(len(a))], real(0), block)
    kept = [i for i in nonzero if i not in rest]
    for j in range(remaining):
        threshold = ((u + real(j)) * total) / real(remaining)
        running, position = real(0), len(a)
        for i in rest:
            running = running + a[i]
            if running > threshold:
                position = i
                break
        if position == len(a) or position in kept:
            position = min((i for i in nonzero if i not in kept), key=lambda i: (abs(i - position), i))
        kept.append(position)
        result[position] = np.copysign(total / real(remaining), block[position])
    return result


def wild_blocks(block: int, count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return blocks `(M, count)` with zeros, ties, near-ties and magnitudes from subnormal to large."""
    generator = torch.Generator().manual_seed(seed)
    mantissa = torch.randint(1, 5, (block, count), generator=generator).to(dtype)
    spread = torch.tensor([0.0, 1.0, 8.0, 24.0, 120.0])[torch.randint(0, 5, (count,), generator=generator)]
    exponent = (torch.rand(block, count, generator=generator) * 2 - 1) * spread
    x = mantissa * 2.0 ** exponent.round().to(dtype)
    x = x * torch.where(torch.rand(block, count, generator=generator) < 0.2, 1 + torch.finfo(dtype).eps, 1.0)
    x = torch.where(torch.rand(block, count, generator=generator) < 0.25, 0.0, x)
    subnormal = torch.rand(count, generator=generator) < 0.1
    x = torch.where(subnormal, x.clamp(max=4.0).ceil() * torch.finfo(dtype).smallest_normal * 2.0**-22, x)
    return x * torch.randint(0, 2, (block, count), generator=generator).mul(2).sub(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_follows_the_definition_bit_for_bit(pattern: str, dtype: torch.dtype) -> None:
    parsed = NMPattern.parse(pattern)
    x = wild_blocks(parsed.block, 400, dtype, seed=1)
    edges = torch.tensor(EDGES)[torch.randint(0, len(EDGES), (400,), generator=torch.Generator().manual_seed(2))]
    anywhere = torch.rand(400, generator=torch.Generator().manual_seed(3))
    u = torch.where(torch.arange(400) % 2 == 0, edges, anywhere).to(dtype)
    pruned, numbers = apply(x, pattern, u).numpy(), u.numpy()
    for b in range(400):
        np.testing.assert_array_equal(pruned[:, b], written_out(x[:, b].numpy(), parsed.n_keep, numbers[b]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", EDGES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_keeps_exactly_n_whatever_the_rounding(pattern: str, u: float, dtype: torch.dtype) -> None:
    parsed = NMPattern.parse(pattern)
    x = wild_blocks(parsed.block, 20_000, dtype, seed=4)
    pruned = apply(x, pattern, torch.full((20_000,), u, dtype=dtype))
    assert (pruned != 0).sum(0).equal((x != 0).sum(0).clamp(max=parsed.n_keep))
    assert (torch.sign(pruned) * torch.sign(x) >= 0).all()
    assert pruned[x == 0].count_nonzero() == 0


positive = st.floats(min_value=0, max_value=2.0**100, width=32, allow_subnormal=True)


@settings(deadline=None, max_examples=200)
@given(st.lists(positive, min_size=2, max_size=12), st.data())
def test_keeps_exactly_n_of_anything(values: list[float], data: st.DataObject) -> None:
    n_keep = data.draw(st.integers(1, len(values) - 1))
    u = data.draw(st.sampled_from(EDGES) | st.integers(0, 2**24 - 1).map(lambda word: word * 2.0**-24))
    x = torch.tensor(values).unsqueeze(1)
    pruned = apply(x, f"{n_keep}:{len(values)}", torch.tensor([u]))
    assert pruned.count_nonzero() == min(n_keep, int(x.count_nonzero()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8"])
def test_keeps_exactly_n_of_every_half_precision_value(pattern: str, dtype: torch.dtype) -> None:
    parsed = NMPattern.parse(pattern)
    words = torch.randint(-(2**15), 2**15, (4096, 16), generator=torch.Generator().manual_seed(5), dtype=torch.int16)
    x = words.view(dtype)
    x = torch.where(x.isfinite() & (x.abs() < 1e37), x, 1.0)
    blocks = x.view(-1, parsed.block)
    kept = mvue(x, pattern, generator=torch.Generator().manual_seed(0)).view(-1, parsed.block)
    assert kept.count_nonzero(1).equal(blocks.count_nonzero(1).clamp(max=parsed.n_keep))


def test_n_equal_non_zeros_are_unchanged_where_their_sum_rounds_up() -> None:
    x = torch.rand(1000, 1, generator=torch.Generator().manual_seed(7)).expand(1000, 8).contiguous()
    x[:, 5] = 0.0
    assert mvue(x, "7:8", generator=torch.Generator().manual_seed(0)).equal(x)


def test_saturated_elements_are_unchanged() -> None:
    x = torch.tensor([[100.0, -1.0, 2.0, 3.0]]).expand(1000, 4)
    pruned = mvue(x, "2:4", generator=torch.Generator().manual_seed(0))
    assert (pruned[:, 0] == 100).all()
    others = pruned[:, 1:]
    assert set(others.flatten().tolist()) == {-6.0, 0.0, 6.0}
    assert (others.count_nonzero(1) == 1).all()


def optimal(a: Tensor, n_keep: int) -> Tensor:
    """Find p_i = min(1, c |a_i|) with Σ p = N by bisection on c, float64 `(M, blocks)`, for more than N non-zeros."""
    low, high = torch.zeros_like(a[0]), n_keep / a.where(a > 0, torch.inf).amin(0)
    for _ in range(200):
        middle = (low + high) / 2
        enough = (middle * a).clamp(max=1).sum(0) >= n_keep
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return (high * a).clamp(max=1)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "1:4", "3:4", "5:16"])
def test_marginals_are_the_optimum(pattern: str) -> None:
    """Each element is kept for a share p of all u: counted over a grid, so within 2 N grid steps of the truth."""
    parsed, steps = NMPattern.parse(pattern), 5000
    generator = torch.Generator().manual_seed(6)
    blocks = torch.rand(parsed.block, 60, generator=generator, dtype=torch.float64) ** 3
    u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    repeated = blocks.repeat_interleave(steps, dim=1)
    saturated, sampled, _ = sample(repeated, parsed.n_keep, u.repeat(60))
    marginals = (saturated | sampled).view(parsed.block, 60, steps).double().mean(2)
    assert (marginals - optimal(blocks, parsed.n_keep)).abs().max() <= 2 * parsed.n_keep / steps


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(2.0**-20, 2.0**20), min_size=4, max_size=4))
def test_less_variance_than_two_blocks_of_one_of_two(values: list[float]) -> None:
    """Equation (21); the variance of an element emitted as e is a e - a², Equation (11) with p = a / e."""
    a = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    saturated, _, step = sample(a, 2, torch.zeros(1, dtype=torch.float64))
    variance = float((a * torch.where(saturated, a, step) - a**2).sum())
    pairs = 2 * (values[0] * values[1] + values[2] * values[3])
    assert variance <= pairs * (1 + 1e-9) + 1e-12 * float((a**2).sum())
