"""The clips that a histogram finds, compared with the same search over the data itself."""

import pytest
import torch
from torch import Tensor

from nmcompile.errors import CalibrationError, ConfigError
from nmcompile.quantization import Grid, Histogram, fake_quantize
from nmcompile.quantization.histogram import BINS, CANDIDATES, SMALLEST

GRIDS = [Grid(4, False), Grid(4, True), Grid(8, False), Grid(2, True)]


def data(seed: int = 0) -> list[Tensor]:
    """Return batches whose range grows."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(5000, generator=generator).relu() for scale in (0.1, 1.0, 0.5, 3.0)]


def observed(batches: list[Tensor]) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.observe(batch)
    return histogram


def error(x: Tensor, clip: float, grid: Grid) -> float:
    return float((fake_quantize(x, clip / grid.high, grid) - x).square().sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_best_clip_is_that_of_the_data(grid: Grid) -> None:
    x = torch.cat(data()).double()
    clip = observed(data()).best_clip(grid)
    scan = [float(x.max()) * share / CANDIDATES for share in range(1, CANDIDATES + 1)]
    assert error(x, clip, grid) <= 1.01 * min(error(x, candidate, grid) for candidate in scan)


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentiles_are_those_of_the_data(percent: float) -> None:
    x = torch.cat(data()).double()
    # The top doubles until it holds the largest, so a bin is less than twice as wide as it could be.
    width = 2 * float(x.max()) / BINS
    clip = observed(data()).percentile(percent)
    assert float((x <= clip + 1e-6).double().mean()) >= percent / 100
    assert float((x <= clip - width).double().mean()) < percent / 100


def test_the_order_of_batches_moves_a_clip_by_a_bin_at_most() -> None:
    forward, backward = observed(data()), observed(data()[::-1])
    assert forward.percentile(99.0) == pytest.approx(backward.percentile(99.0), abs=4 * forward.largest / BINS)
    assert int(forward.counts.sum()) == int(backward.counts.sum()) == int((torch.cat(data()) > 0).sum())
    assert forward.zeros == backward.zeros == int((torch.cat(data()) == 0).sum())


def test_signs_do_not_matter() -> None:
    x = torch.randn(1000)
    assert observed([x]).percentile(99.0) == observed([-x]).percentile(99.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    assert observed([x]).percentile(100.0) == pytest.approx(float(x.abs().max()), rel=1e-6)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "saw nothing"),
        ([torch.empty(0)], "saw nothing"),
        ([torch.zeros(4)], "only zeros"),
        ([torch.tensor([3e-42, 0.0])], "no value above 3.0e-42"),
        ([torch.tensor([1.0, torch.nan])], "NaN or infinity"),
        ([torch.ones(4), torch.tensor([torch.inf])], "NaN or infinity"),
    ],
)
def test_bad_data_is_an_error(batches: list[Tensor], message: str) -> None:
    histogram = observed(batches)
    with pytest.raises(CalibrationError, match=message):
        histogram.best_clip(Grid(4, False))
    with pytest.raises(CalibrationError, match=message):
        histogram.percentile(99.0)


@pytest.mark.parametrize("grid", [Grid(4, False), Grid(8, True)], ids=str)
def test_the_smallest_values_that_have_a_clip(grid: Grid) -> None:
    histogram = observed([torch.full((8,), SMALLEST)])
    assert histogram.best_clip(grid) == pytest.approx(SMALLEST, rel=0.02)


@pytest.mark.parametrize("percent", [-1.0, 0.0, 100.1, float("nan")])
def test_percentages_outside_the_data_are_refused(percent: float) -> None:
    with pytest.raises(ConfigError, match="percent is"):
        observed(data()).percentile(percent)
