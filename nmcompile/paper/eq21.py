"""Equation (21): MVUE 2:4 of a block has at most the variance of MVUE 1:2 on both halves (Section 4.3).

The paper proves it for blocks in which no probability is clipped at 1. Here all blocks of a scan are checked, clipped
ones too, and blocks drawn from distributions.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmcompile.paper.experiment import Analysis, Findings
from nmcompile.paper.variance import optimal_variance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP = 0.02
DRAWN = 200_000
CAPTION = (
    "Var(MVUE 2:4) over Var(MVUE 1:2) of both halves of the block, all |a| up to 1 in steps of "
    f"{STEP}, and {DRAWN:,} blocks from each distribution. Equation (21) says that no ratio exceeds 1. "
    "Clipped: blocks with an element kept with probability 1, which the paper's proof leaves out."
)


def samples() -> dict[str, Tensor]:
    """Return blocks by the name of their origin, `(blocks, 4)` float64, non-negative."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2, DRAWN, 4, dtype=torch.float64, generator=generator)
    steps = torch.linspace(0, 1, round(1 / STEP) + 1, dtype=torch.float64)
    scan = torch.cartesian_prod(steps, steps, steps)
    return {
        "scan": torch.cat([scan, torch.ones_like(scan[:, :1])], dim=1),
        "normal": normal[0].abs(),
        "lognormal, σ = 1": normal[1].exp(),
        "lognormal, σ = 3": (3 * normal[1]).exp(),
    }


def halves_variance(a: Tensor) -> Tensor:
    """Return the summed variance of MVUE 1:2 on both halves of each block, by the closed form 2 |a b|."""
    return 2 * (a[:, 0] * a[:, 1] + a[:, 2] * a[:, 3])


def is_clipped(a: Tensor) -> Tensor:
    """Return whether the optimum keeps an element with probability 1."""
    return 2 * a.max(dim=1).values >= a.sum(1)


def compute() -> Findings:
    headers = ["blocks", "number", "clipped", "mean variance 2:4 / 1:2", "most, unclipped", "most, clipped", "above 1"]
    rows: list[list[object]] = []
    shown: dict[str, Tensor] = {}
    for name, a in samples().items():
        whole, halves, clipped = optimal_variance(a, 2), halves_variance(a), is_clipped(a)
        above = int((whole > halves + 1e-12 * a.square().sum(1)).sum())
        ratio, inner = (whole / halves)[halves > 0], clipped[halves > 0]
        most = [ratio[~inner].max().item(), ratio[inner].max().item()]
        share = f"{clipped.double().mean().item():.1%}"
        rows.append([name, len(a), share, (whole.sum() / halves.sum()).item(), *most, above])
        shown[name] = ratio
    return Findings(headers, rows, CAPTION, lambda figure: draw(figure, shown))


def draw(figure: "Figure", shown: dict[str, Tensor]) -> None:
    """Draw the distribution of the ratio for each kind of blocks."""
    axes = figure.add_subplot()
    shares = torch.linspace(0, 1, 201, dtype=torch.float64)
    for name, ratio in shown.items():
        axes.plot(ratio.quantile(shares), shares, label=name)
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="Var(MVUE 2:4) / (Var(MVUE 1:2) + Var(MVUE 1:2))", ylabel="share of blocks below")
    axes.legend()


EXPERIMENT = Analysis("eq21", "Equation 21: MVUE 2:4 has less variance than two MVUE 1:2", compute)
