"""Beyond the paper: where the bias of pruned gradients goes behind batch norm.

The loss does not change with the mean of a convolution's output that batch norm normalizes, so the true gradient of the
output sums to zero over each channel. A pruned one does not. If it is unbiased, the sums are noise; if it is biased,
they have the same sign batch after batch. Then the mean of the output moves at each step, nothing moves it back, and
the running statistics, which the test reads, lag behind it.
"""

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmcompile.demo.images import load_images
from nmcompile.demo.resnet import ResNet
from nmcompile.demo.training import train
from nmcompile.paper.experiment import Analysis, Findings
from nmcompile.pruning.references import OPERATORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES, BATCH, BATCHES = 5000, 64, 60
ROWS = {"greedy": "greedy", "biased": "biased", "uniform": "uniform", "unbiased": "unbiased", "MVUE": "mvue"}
"""Operators by their names in Table 2."""
OF_NOISE = math.sqrt(2 / math.pi)  # mean size of a normal variable, in standard deviations
CAPTION = (
    "Sum of a pruned gradient (1:2 across the batch) over a channel of a convolution's output before batch norm, in % "
    f"of the sum of magnitudes; unpruned it is 0. Small ResNet after an epoch, {BATCHES} batches of {BATCH}, mean over "
    "all channels: the size of the average over the batches, and the size that noise alone would give it."
)


def watch(model: nn.Module) -> dict[nn.Module, Tensor]:
    """Return a dictionary that holds, after a backward, the gradient of the output of each convolution without bias."""
    gradients: dict[nn.Module, Tensor] = {}

    def keep(conv: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        y.register_hook(partial(gradients.__setitem__, conv))

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:  # batch norm stands behind it
            module.register_forward_hook(keep)
    return gradients


def imbalance(gradient: Tensor, operator: str) -> Tensor:
    """Return Σ pruned / Σ |gradient| for each channel of a gradient `(batch, channels, height, width)`."""
    pruned = OPERATORS[operator](gradient, "1:2", dim=0)
    return pruned.sum((0, 2, 3)) / gradient.abs().sum((0, 2, 3))


def sizes(imbalances: Tensor) -> tuple[float, float]:
    """Return the mean size of the average of `(batches, channels)`, and the size that noise alone would give it."""
    deviation, average = torch.std_mean(imbalances, dim=0)
    return average.abs().mean().item(), OF_NOISE * deviation.mean().item() / math.sqrt(len(imbalances))


def compute() -> Findings:
    images = load_images(None)
    torch.manual_seed(0)
    model = ResNet(images.train_images.shape[-1], int(images.train_labels.max()) + 1)
    train(model, images, IMAGES, 1, 1, "drift")
    gradients = watch(model)
    found: dict[str, list[Tensor]] = {name: [] for name in ROWS}
    for rows in torch.arange(BATCHES * BATCH).split(BATCH):
        F.cross_entropy(model(images.train_images[rows]), images.train_labels[rows]).backward()
        for name, operator in ROWS.items():
            found[name].append(torch.cat([imbalance(gradient, operator) for gradient in gradients.values()]))
    shares = {name: sizes(100 * torch.stack(imbalances)) for name, imbalances in found.items()}
    rows_of_table = [[name, average, noise, average / noise] for name, (average, noise) in shares.items()]
    headers = ["operator", "average, %", "noise alone, %", "average / noise"]
    return Findings(headers, rows_of_table, CAPTION, lambda figure: draw(figure, shares))


def draw(figure: "Figure", shares: dict[str, tuple[float, float]]) -> None:
    axes = figure.add_subplot()
    for number, label in enumerate(("average over the batches", "noise alone")):
        places = [index + 0.38 * (number - 0.5) for index in range(len(shares))]
        axes.bar(places, [share[number] for share in shares.values()], width=0.36, label=label)
    axes.set_xticks(range(len(shares)), list(shares))
    axes.set(ylabel="sum over a channel, % of the sum of magnitudes")
    axes.legend()


EXPERIMENT = Analysis("drift", "Beyond the paper: bias of pruned gradients behind batch norm", compute)
