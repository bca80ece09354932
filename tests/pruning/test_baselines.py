import pytest
import torch
from torch import Tensor

from nmcompile.pruning import NMPattern, biased, greedy, mask, mvue, sdgp, unbiased, uniform
from nmcompile.pruning.baselines import select_uniform


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_biased_keeps_what_mvue_keeps() -> None:
    x = noise(500, 8)
    expected = torch.where(mvue(x, "2:4", generator=generator()) != 0, x, 0.0)
    assert biased(x, "2:4", generator=generator()).equal(expected)


def test_unbiased_scales_what_uniform_keeps() -> None:
    x = noise(500, 12)
    for pattern, factor in [("2:4", 2.0), ("1:4", 4.0), ("2:3", 1.5)]:
        kept = uniform(x, pattern, generator=generator())
        assert ((kept == 0) | (kept == x)).all()
        assert unbiased(x, pattern, generator=generator()).equal(kept * factor)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "1:4", "3:4", "7:8", "2:5", "31:32"])
def test_uniform_keeps_every_position_equally_often(pattern: str) -> None:
    parsed, count = NMPattern.parse(pattern), 155 * 64
    u = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).unsqueeze(0)
    kept = select_uniform(torch.ones(parsed.block, count, dtype=torch.float64), parsed, u).mask
    assert (kept.sum(0) == parsed.n_keep).all()
    assert (kept.double().mean(1) - parsed.density).abs().max() <= 2 / count


@pytest.mark.parametrize("u", [0.0, 2.0**-24, 1 - 2.0**-23, 1 - 2.0**-24])
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "3:4", "7:8", "15:16", "63:64"])
def test_uniform_keeps_exactly_n_at_the_edges(pattern: str, u: float) -> None:
    parsed = NMPattern.parse(pattern)
    kept = select_uniform(torch.ones(parsed.block, 1), parsed, torch.tensor([[u]])).mask
    assert kept.sum() == parsed.n_keep


def test_sdgp_keeps_the_norm_of_every_sample_and_channel() -> None:
    x = noise(3, 8, 5, 6)
    pruned = sdgp(x, "2:4", dim=1)
    kept = greedy(x, "2:4", dim=1)
    assert (pruned != 0).equal(mask(x, "2:4", dim=1))
    factor = x.abs().sum((2, 3), keepdim=True) / (kept.abs().sum((2, 3), keepdim=True) + 1e-4)
    torch.testing.assert_close(pruned, kept * factor)
    torch.testing.assert_close(pruned.abs().sum((2, 3)), x.abs().sum((2, 3)), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("shape", "dim"), [((6, 8), -1), ((2, 6, 8), -1), ((8, 6), 0), ((8,), 0)])
def test_sdgp_without_positions_keeps_the_norm_along_the_blocks(shape: tuple[int, ...], dim: int) -> None:
    x = noise(*shape)
    pruned = sdgp(x, "2:4", dim=dim)
    torch.testing.assert_close(pruned.abs().sum(dim), x.abs().sum(dim), rtol=1e-3, atol=0)
    ratio = (pruned / x).where(pruned != 0, torch.nan).movedim(dim, -1)
    torch.testing.assert_close(ratio.nan_to_num(0).amax(-1), ratio.nan_to_num(9e9).amin(-1))
