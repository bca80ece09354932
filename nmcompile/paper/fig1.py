"""Figure 1: 1:2 estimators on the first quarter of the unit circle.

Each block [cos t, sin t] is pruned 100 times, and the results are averaged. Greedy pruning gives a biased average, the
unbiased uniform draw a wide one, and MVUE an unbiased average of less spread.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmcompile.paper.experiment import Analysis, Findings
from nmcompile.pruning.references import OPERATORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCKS = 17
SAMPLES = 100
METHODS = ("greedy", "unbiased", "mvue")
CAPTION = (
    f"Blocks [a, b] on the unit circle (red), and the averages of {SAMPLES} results of each 1:2 operator (green). "
    "Bias: the mean distance of the expected result from the block. Variance: the mean over the blocks of the summed "
    "variance of both elements, measured and by theory (0, a² + b² and 2 |a b|). No units: the circle has radius 1."
)


def blocks() -> Tensor:
    """Return the blocks, `(BLOCKS, 2)` float64."""
    angles = torch.linspace(0, torch.pi / 2, BLOCKS, dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def sample(method: str, samples: int) -> Tensor:
    """Prune each block repeatedly: `(samples, BLOCKS, 2)` float64."""
    generator = torch.Generator().manual_seed(0)
    return OPERATORS[method](blocks().repeat(samples, 1, 1), "1:2", generator=generator)


def theory(method: str) -> tuple[float, float]:
    """Return the mean bias and the mean variance of a method in closed form."""
    x = blocks()
    a, b = x.T
    if method == "greedy":
        return float(x.min(dim=1).values.mean()), 0.0
    return 0.0, float((a * a + b * b if method == "unbiased" else 2 * a * b).mean())


def compute() -> Findings:
    found = {method: sample(method, SAMPLES) for method in METHODS}
    headers = ["method", "bias", "distance of the average", "variance", "variance by theory"]
    rows: list[list[object]] = []
    for method, results in found.items():
        distance = (results.mean(0) - blocks()).norm(dim=1).mean().item()
        bias, variance = theory(method)
        rows.append([method, bias, distance, results.var(0).sum(1).mean().item(), variance])
    return Findings(headers, rows, CAPTION, lambda figure: draw(figure, found))


def draw(figure: "Figure", found: Mapping[str, Tensor]) -> None:
    figure.set_size_inches(8, 3.8)
    panels = figure.subplots(1, len(found), sharey=True)
    for panel, (method, results) in zip(panels, found.items(), strict=True):
        panel.plot(*blocks().T, "o", color="tab:red", markersize=4, label="block")
        panel.plot(*results.mean(0).T, "x", color="tab:green", label=f"average of {SAMPLES}")
        panel.set(title=method, xlabel="a", aspect="equal")
    panels[0].set_ylabel("b")
    panels[0].legend(fontsize="small")


EXPERIMENT = Analysis("fig1", "Figure 1: 1:2 estimators on the unit circle", compute)
