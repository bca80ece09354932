"""Training recipes: the paper's for full scale, and one of minutes for a CPU."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from nmcompile.training import clips

Schedule = Literal["constant", "one cycle", "cosine", "steps"]
WARM_UP = 0.3  # of a one-cycle schedule
DROPS = (30 / 90, 60 / 90, 80 / 90)
CLIP_DECAY = 1e-3  # of PACT's learned clips


@dataclass(frozen=True)
class Recipe:
    """How every row of an experiment is trained.

    Args:
        images: the number of training samples that are used; `None` for all.
        rate: the largest learning rate.
        schedule: `"constant"`; `"one cycle"` rises linearly and falls as a cosine, `"cosine"` falls from the start;
            `"steps"` divides by ten after 30, 60 and 80 of 90 epochs, or the same shares of others.
        optimizer: SGD with momentum 0.9, or AdamW.
    """

    epochs: int
    batch: int
    rate: float
    decay: float
    schedule: Schedule = "one cycle"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    images: int | None = None

    def rate_at(self, progress: float) -> float:
        """Return the learning rate when a share of the phase's steps is done."""
        if self.schedule == "constant":
            return self.rate
        if self.schedule == "steps":
            return self.rate / 10.0 ** sum(progress >= drop for drop in DROPS)
        rising = WARM_UP if self.schedule == "one cycle" else 0.0
        if progress < rising:
            return self.rate * (0.04 + 0.96 * progress / rising)
        return self.rate * (1 + math.cos(math.pi * (progress - rising) / (1 - rising))) / 2

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a model and, with a decay of their own, of its learned clips."""
        learned = clips(model)
        groups: list[dict[str, object]] = [{"params": list(model.parameters())}]
        groups += [{"params": learned, "weight_decay": CLIP_DECAY}] if learned else []
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, self.rate, weight_decay=self.decay)
        return torch.optim.SGD(groups, self.rate, momentum=0.9, weight_decay=self.decay)


QUICK = Recipe(epochs=3, batch=64, rate=0.1, decay=5e-4, images=5_000)
CONSTANT = replace(QUICK, epochs=4, rate=0.01, schedule="constant")
"""Training that is far from done when it ends: pruned gradients go on moving the weights.

A rate that falls to zero within a few epochs hides a bias. The weights stop, and batch statistics catch up with them.
"""
PAPER = Recipe(epochs=90, batch=256, rate=0.1, decay=1e-4, schedule="steps")
"""The paper's recipe for ImageNet (Section 6.1)."""
