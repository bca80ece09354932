"""Figure 2: the variance of approx-MVUE 2:4 over that of exact MVUE 2:4 stays below 2 (Section 4.4).

The paper sets a_4 = 1 and scans a_1 <= a_2 <= a_3 <= a_4 in steps of 0.005, and in logarithmic steps near the edge
where a_4 is far above the others.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmcompile.paper.experiment import Analysis, Findings
from nmcompile.paper.variance import approximate_variance, optimal_variance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP = 0.005
DECADES = 8
PER_DECADE = 12
CAPTION = (
    f"Var(approx-MVUE 2:4) / Var(MVUE 2:4) for all blocks a1 <= a2 <= a3 <= a4 = 1 in steps of {STEP}, and in "
    f"{PER_DECADE} logarithmic steps a decade down to 1e-{DECADES} of a4, over (a1 + a2 + a3) / a4 (no units); "
    "the paper: bounded by 2, and largest where a4 is far above the others."
)


def sorted_blocks(values: Tensor) -> Tensor:
    """Return all blocks [a1, a2, a3, 1] with a1 <= a2 <= a3 of `values` (ascending) and three non-zeros or more."""
    triples = torch.combinations(values, 3, with_replacement=True)
    triples = triples[triples[:, 1] > 0]  # with two non-zeros both variances are 0
    return torch.cat([triples, torch.ones_like(triples[:, :1])], dim=1)


def ratios(blocks: Tensor) -> Tensor:
    """Return the ratio of the variances, `(blocks,)`; 1 where both estimators are exact."""
    optimal = optimal_variance(blocks, 2)
    return torch.where(optimal > 0, approximate_variance(blocks) / optimal, 1.0)


def scans() -> dict[str, Tensor]:
    """Return the blocks of the linear and of the logarithmic scan, `(blocks, 4)` float64."""
    linear = torch.linspace(0, 1, round(1 / STEP) + 1, dtype=torch.float64)
    logarithmic = torch.logspace(-DECADES, 0, DECADES * PER_DECADE + 1, dtype=torch.float64)
    return {f"steps of {STEP}": sorted_blocks(linear), "logarithmic steps": sorted_blocks(logarithmic)}


def compute() -> Findings:
    found = {name: (blocks, ratios(blocks)) for name, blocks in scans().items()}
    headers = ["scan", "blocks", "mean ratio", "least", "most", "2 - most", "at a1, a2, a3", "the paper's bound"]
    rows: list[list[object]] = []
    for name, (blocks, ratio) in found.items():
        place = ", ".join(f"{value:.3g}" for value in blocks[ratio.argmax()][:3].tolist())
        least, most = ratio.min().item(), ratio.max().item()
        rows.append([name, len(blocks), ratio.mean().item(), least, most, 2 - most, place, "< 2"])
    return Findings(headers, rows, CAPTION, lambda figure: draw(figure, found))


def draw(figure: "Figure", found: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Draw the range of the ratio over the sum of the three smaller elements."""
    axes = figure.add_subplot()
    for name, (blocks, ratio) in found.items():
        sums, low, high = envelope(blocks[:, :3].sum(1), ratio)
        axes.fill_between(sums, low, high, alpha=0.4, label=f"{name}: least to most")
        axes.plot(sums, high, linewidth=1)
    axes.axhline(2, color="black", linestyle="--", linewidth=1, label="2")
    axes.set(xscale="log", xlabel="(a1 + a2 + a3) / a4", ylabel="ratio of the variances")
    axes.legend()


def envelope(sums: Tensor, ratio: Tensor, bins: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each of some logarithmic bins of `sums` its middle, and the least and the largest ratio in it."""
    edges = torch.logspace(sums.min().log10().item(), sums.max().log10().item(), bins + 1, dtype=sums.dtype)
    index = torch.bucketize(sums, edges[1:-1])
    low = torch.full((bins,), torch.inf, dtype=sums.dtype).scatter_reduce(0, index, ratio, "amin")
    high = torch.full((bins,), -torch.inf, dtype=sums.dtype).scatter_reduce(0, index, ratio, "amax")
    filled = high >= low
    return (edges[:-1] * edges[1:]).sqrt()[filled], low[filled], high[filled]


EXPERIMENT = Analysis("fig2", "Figure 2: approx-MVUE 2:4 is a 2-approximation", compute)
