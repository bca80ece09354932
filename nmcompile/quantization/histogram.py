"""Choice of the clip of an activation grid from observed values, in bounded memory."""

import math
from numbers import Real

import torch
from torch import Tensor

from nmcompile.checks import check_floating, check_kind, check_number
from nmcompile.errors import CalibrationError
from nmcompile.quantization.grid import TINIEST, Grid, integers

BINS = 4096
CANDIDATES = 256
SMALLEST = TINIEST * CANDIDATES * 256  # a 256th of it, in 8-bit steps, is still a normal float32


class Histogram:
    """Counts of |x| in equal bins from 0 to a top, which doubles as larger values come. Zeros are counted apart."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.top = 0.0
        self.largest = 0.0
        self.zeros = 0
        self.is_finite = True

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Add the elements of a tensor of any shape. Non-finite elements are not counted; `is_finite` notes them."""
        check_floating("x", x)
        magnitudes = x.detach().abs().flatten().to(torch.promote_types(x.dtype, torch.float32))
        finite = magnitudes.isfinite()
        self.is_finite = self.is_finite and bool(finite.all())
        magnitudes = magnitudes[finite]
        self.zeros += int((magnitudes == 0).sum())
        magnitudes = magnitudes[magnitudes > 0]
        if not magnitudes.numel():
            return
        self._reach(float(magnitudes.max()))
        bins = (magnitudes / self.top * BINS).long().clamp_(max=BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS).cpu()

    def percentile(self, percent: float) -> float:
        """Return the magnitude that `percent` of all elements do not exceed, to one bin; at least one bin.

        Raises:
            ConfigError: not 0 < percent <= 100.
            CalibrationError: only zeros or nothing was observed, or a NaN or an infinity.
        """
        check_number("percent", percent, Real, math.nextafter(0, 1), 100, "a percentage above 0, at most 100")
        self._check()
        reached = self.zeros + self.counts.cumsum(0)
        index = int(torch.searchsorted(reached, percent / 100 * reached[-1]))
        return min((index + 1) * self.top / BINS, self.largest)

    def best_clip(self, grid: Grid) -> float:
        """Return the clip whose grid has the least mean squared error, with each bin represented by its centre.

        Raises:
            CalibrationError: only zeros or nothing was observed, or a NaN or an infinity.
        """
        check_kind("grid", grid, Grid, "a Grid, as in Grid(4, signed=True)")
        self._check()
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.top / BINS)
        clips = torch.linspace(1 / CANDIDATES, 1, CANDIDATES, dtype=torch.float64) * self.largest
        errors = [_error(centres, self.counts, float(clip) / grid.high, grid) for clip in clips]
        return float(clips[int(torch.stack(errors).argmin())])

    def _reach(self, largest: float) -> None:
        """Double the top, and merge bins in pairs, until `largest` fits."""
        self.largest = max(self.largest, largest)
        if self.top == 0:
            self.top = largest
        while self.top < largest:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), torch.zeros(BINS // 2, dtype=torch.float64)])
            self.top *= 2

    @property
    def has_clip(self) -> bool:
        """Return whether a grid of float32 steps reaches some of the elements."""
        return self.is_finite and self.largest >= SMALLEST

    def _check(self) -> None:
        if not self.is_finite:
            raise CalibrationError("the calibration data gives NaN or infinity here; remove such samples")
        if not self.counts.any():
            what = "only zeros" if self.zeros else "nothing"
            raise CalibrationError(f"calibration saw {what} here; give data that reaches it with non-zero values")
        if not self.has_clip:
            raise CalibrationError(
                f"calibration saw no value above {self.largest:.1e} here, and float32 has no grid for such small ones; "
                "scale the weights before it, or leave the layer dense"
            )


def _error(centres: Tensor, counts: Tensor, scale: float, grid: Grid) -> Tensor:
    return (counts * (integers(centres, scale, grid) * scale - centres).square()).sum()
