"""Figure 5: 4:8 activations need the ReLU before them (Section 6.3).

As an activation function by itself, 4:8 pruning by value loses accuracy. After a ReLU it does not.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from nmcompile import pruning
from nmcompile.config import CompileConfig
from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.methods import Compiled, plain
from nmcompile.paper.recipe import PAPER, QUICK

PATTERN = "4:8"
AFTER_RELU = Compiled("activations", CompileConfig(placement="activation"))


class PruneByValue(nn.Module):
    """An activation function that keeps the largest four of eight channels, whatever their sign."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(pruning.greedy_by_value.mask(x.detach(), PATTERN, 1), x, 0.0)


def without_relu(model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
    """Prune in place of each ReLU."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, PruneByValue())
    yield model


EXPERIMENT = Comparison(
    name="fig5",
    title="Figure 5: 4:8 activations with and without ReLU",
    rows=(Row("baseline", plain), Row("ReLU + 4:8", AFTER_RELU), Row("4:8 without ReLU", without_relu)),
    settings={"quick": Setting("images", "small", QUICK), "full": Setting("images", "resnet18-cifar", PAPER)},
    orders=(("ReLU + 4:8", "4:8 without ReLU"),),
    caption=(
        "Test accuracy (%) after each epoch with ReLU, with 4:8 pruning by value after each ReLU, and with 4:8 pruning "
        "in place of it: mean and range of the seeds. The paper (ResNet-18, CIFAR-10): ReLU + 4:8 is on par with the "
        "baseline, 4:8 alone is not."
    ),
    curves=True,
)
