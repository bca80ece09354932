"""Beyond the paper: the gradient noise scale, and what MVUE adds to it.

The gradient of a batch of B samples varies by tr Σ / B around the true gradient G. Training at batch size B takes
1 + B_noise / B times the steps of exact gradients, with B_noise = tr Σ / |G|² (McCandlish et al. 2018). MVUE adds a
variance of v / B: the steps grow by the factor 1 + (v / |G|²) / (B + B_noise). Solved for B, that is the batch size
from which MVUE costs less than one epoch of the paper's 90.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmcompile.demo.images import Images, load_images
from nmcompile.demo.resnet import ResNet
from nmcompile.demo.training import train
from nmcompile.paper.experiment import Analysis, Findings
from nmcompile.paper.methods import gradients

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 64
BATCHES = 32
DRAWS = 16
IMAGES = 5000
EPOCHS = (0, 1, 2)
EPOCHS_OF_THE_PAPER = 90
SHOWN = 256
OPERATORS = {
    "MVUE 2:4": ("mvue", "2:4"),
    "approx-MVUE 2:4": ("mvue_approx", "2:4"),
    "MVUE 1:2": ("mvue", "1:2"),
    "MVUE 1:4": ("mvue", "1:4"),
}
CAPTION = (
    f"Gradient noise of a small ResNet after some epochs on {IMAGES:,} images, from {BATCHES} batches of {BATCH}, and "
    f"the variance that pruned gradients add ({DRAWS} batches). More steps: at the paper's batch of {SHOWN}. The last "
    f"column is the batch size from which pruning costs less than one epoch in {EPOCHS_OF_THE_PAPER}; 0 is any."
)


@dataclass(frozen=True)
class Noise:
    """Squared norm of the true gradient, and the variance of a sample's gradient: |G|² and tr Σ."""

    signal: float
    variance: float

    @property
    def scale(self) -> float:
        """Return B_noise, in samples."""
        return self.variance / self.signal

    def more_steps(self, added: float, batch: float) -> float:
        """Return the share of steps that the added variance of a sample costs at a batch size."""
        return added / self.signal / (batch + self.scale)

    def batch_for(self, added: float, share: float) -> float:
        """Return the batch size at which it costs that share of the steps; 0 if it costs less at any size."""
        return max(0.0, added / self.signal / share - self.scale)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of all parameters as one vector."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def measure_noise(found: Sequence[Tensor], batch: int) -> Noise:
    """Return the noise that the gradients of several batches show."""
    stacked = torch.stack(list(found)).double()
    mean = stacked.mean(0)
    of_batch = (stacked - mean).square().sum().item() / (len(stacked) - 1)
    return Noise(mean.square().sum().item() - of_batch / len(stacked), of_batch * batch)


def batches(images: Images, count: int) -> list[tuple[Tensor, Tensor]]:
    chosen = torch.arange(count * BATCH).split(BATCH)
    return [(images.train_images[rows], images.train_labels[rows]) for rows in chosen]


def added_variance(model: nn.Module, operator: str, pattern: str, images: Images) -> float:
    """Return the variance that pruning adds to the gradient of a sample: v."""
    (sparse,) = gradients(operator, pattern)(copy.deepcopy(model), [images.train_images[:BATCH]])
    squares = [(gradient(sparse, *pair) - gradient(model, *pair)).square().sum() for pair in batches(images, DRAWS)]
    return BATCH * torch.stack(squares).mean().item()


def compute() -> Findings:
    images = load_images(None)
    torch.manual_seed(0)
    model: nn.Module = ResNet(images.train_images.shape[-1], int(images.train_labels.max()) + 1).train()
    rows: list[list[object]] = []
    shares: dict[str, list[float]] = {}
    done = 0
    for epochs in EPOCHS:
        if epochs > done:
            train(model, images, IMAGES, epochs - done, epochs, "noise")
        done = epochs
        probe = copy.deepcopy(model)  # its batch statistics move
        noise = measure_noise([gradient(probe, *pair) for pair in batches(images, BATCHES)], BATCH)
        for name, (operator, pattern) in OPERATORS.items():
            added = added_variance(probe, operator, pattern, images)
            more, size = noise.more_steps(added, SHOWN), noise.batch_for(added, 1 / EPOCHS_OF_THE_PAPER)
            rows.append([epochs, name, noise.scale, added / noise.variance, f"{more:.1%}", size])
            shares.setdefault(name, []).append(added / noise.variance)
    headers = ["epochs", "operator", "B_noise", "variance added / sampled", "more steps", "batch for one epoch"]
    return Findings(headers, rows, CAPTION, lambda figure: draw(figure, shares))


def draw(figure: "Figure", shares: dict[str, list[float]]) -> None:
    axes = figure.add_subplot()
    for number, (name, heights) in enumerate(shares.items()):
        places = [index + 0.2 * (number - 1.5) for index in range(len(heights))]
        axes.bar(places, heights, width=0.18, label=name)
    axes.set_xticks(range(len(EPOCHS)), [str(epochs) for epochs in EPOCHS])
    axes.set(xlabel="epochs of training", ylabel="variance added by pruning / variance of sampling")
    axes.legend(fontsize="small")


EXPERIMENT = Analysis("noise", "Beyond the paper: gradient noise scale with MVUE", compute)
