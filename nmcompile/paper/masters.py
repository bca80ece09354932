"""Beyond the paper: masters of the weights in fp32 and in bfloat16, dense and in mode "training"."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.methods import Method, describe, plain, weights_and_gradients
from nmcompile.paper.recipe import PAPER, QUICK

TRAINING = weights_and_gradients("mvue", "2:4")


@dataclass(frozen=True)
class InBfloat16:
    """A method whose model, optimizer state and gradients are bfloat16."""

    method: Method

    def __call__(self, model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
        """Yield the method's models in bfloat16."""
        return self.method(model.to(torch.bfloat16), [x.to(torch.bfloat16) for x in calibration])

    def __str__(self) -> str:
        return f"{describe(self.method)}, bfloat16"


EXPERIMENT = Comparison(
    name="masters",
    title="Beyond the paper: fp32 and bfloat16 masters",
    rows=(
        Row("dense, fp32", plain),
        Row("dense, bfloat16", InBfloat16(plain)),
        Row("training, fp32", TRAINING),
        Row("training, bfloat16", InBfloat16(TRAINING)),
    ),
    settings={"quick": Setting("images", "small", QUICK), "full": Setting("imagenet", "resnet18", PAPER)},
    caption=(
        "Test accuracy (%) with weights, gradients and momentum in fp32 or bfloat16, dense and with transposable 2:4 "
        "weights and MVUE 2:4 gradients."
    ),
)
