"""Fit SAWB's pair (c1, c2) on the zero-aligned grid, and compare it with the pair in use.

For each of six laws of weights, numerical integration in float64 finds the clip with the least mean squared error.
Least squares over the laws then fit clip / E|w| = c1 * sqrt(E[w^2]) / E|w| - c2.

python benchmarks/sawb_fit.py        # writes benchmarks/results/sawb_fit.json
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import scipy
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from tabulate import tabulate

from nmcompile.quantization import Grid
from nmcompile.quantization.sawb import COEFFICIENTS

CLIPS = np.geomspace(1, 30, 40)  # scanned, in units of E|w|; the best one is then refined between its neighbours


@dataclass(frozen=True)
class Law:
    """A symmetric law of weights, given by the density of its magnitudes up to a factor."""

    name: str
    density: Callable[[float], float]
    end: float = 40.0  # of the support; the longest of the infinite tails holds less than 1e-15 beyond

    def expect(self, value: Callable[[float], float], low: float = 0.0, high: float = math.inf) -> float:
        """Return E[value(|w|); low < |w| < high]."""
        return float(quad(lambda w: self.density(w) * value(w), min(low, self.end), min(high, self.end))[0]) / self.mass

    @cached_property
    def mass(self) -> float:
        return float(quad(self.density, 0, self.end)[0])

    @cached_property
    def mean(self) -> float:
        return self.expect(lambda w: w)

    @cached_property
    def root(self) -> float:
        """Return sqrt(E[w^2])."""
        return math.sqrt(self.expect(lambda w: w * w))

    def error(self, clip: float, high: int) -> float:
        """Return the mean squared error on the grid of the integers -high to high times clip / high."""
        step = clip / high
        edges = [0.0, *((k + 0.5) * step for k in range(high)), math.inf]
        return sum(self.expect(lambda w, k=k: (w - k * step) ** 2, edges[k], edges[k + 1]) for k in range(high + 1))

    def best_clip(self, high: int) -> float:
        errors = [self.error(float(clip) * self.mean, high) for clip in CLIPS]
        near = min(max(int(np.argmin(errors)), 1), len(CLIPS) - 2)
        bounds = self.mean * CLIPS[near - 1], self.mean * CLIPS[near + 1]
        found = minimize_scalar(lambda c: self.error(c, high), bounds=bounds, method="bounded", options={"xatol": 1e-9})
        return float(found.x)

    def excess(self, pair: tuple[float, float], high: int, best: float) -> float:
        """Return the excess of the error with the pair's clip over the least error, as a fraction of it."""
        clip = pair[0] * self.root - pair[1] * self.mean
        clip = clip if self.mean <= clip <= self.end else self.end  # as `sawb_scale` does
        return self.error(clip, high) / self.error(best, high) - 1


LAWS = (
    Law("normal", lambda w: math.exp(-w * w / 2)),
    Law("Laplace", lambda w: math.exp(-w)),
    Law("logistic", lambda w: math.exp(-w) / (1 + math.exp(-w)) ** 2),
    Law("uniform", lambda w: 1.0, end=1.0),
    Law("triangular", lambda w: 1 - w, end=1.0),
    Law("von Mises(1)", lambda w: math.exp(math.cos(w)), end=math.pi),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sawb_fit.json")
    options = parser.parse_args()
    results = [compared(bits) for bits in COEFFICIENTS]
    options.out.write_text(json.dumps({"scipy": scipy.__version__, "results": results}, indent=2) + "\n")


def compared(bits: int) -> dict[str, object]:
    """Fit, print and return the pairs of a grid with their excess errors."""
    high, used = Grid(bits, signed=True).high, COEFFICIENTS[bits]
    best = {law: law.best_clip(high) for law in LAWS}
    fitted = fit(best)
    laws = [
        {
            "law": law.name,
            "best clip / E|w|": clip / law.mean,
            "excess, fitted": law.excess(fitted, high, clip),
            "excess, in use": law.excess(used, high, clip),
        }
        for law, clip in best.items()
    ]
    print(f"{bits} bits: fitted ({fitted[0]:.3f}, {fitted[1]:.3f}), in use {used}")
    print(tabulate(laws, headers="keys", floatfmt=("", ".3f", ".2%", ".2%")), end="\n\n")
    return {"bits": bits, "fitted": fitted, "in use": used, "laws": laws}


def fit(best: dict[Law, float]) -> tuple[float, float]:
    """Fit (c1, c2) by least squares."""
    ratios = np.array([[law.root / law.mean, -1.0] for law in best])
    clips = np.array([clip / law.mean for law, clip in best.items()])
    c1, c2 = np.linalg.lstsq(ratios, clips, rcond=None)[0]
    return float(c1), float(c2)


if __name__ == "__main__":
    main()
