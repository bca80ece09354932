"""Beyond the paper: tiles of transposable masks, true ones and those of the reference code.

A transposed GEMM needs tiles of M out-channels by M in-channels. The public code of Hubara et al. (2021) takes M²
consecutive inputs of one out-channel for a tile: a looser constraint, under which a third of the groups along the
out-channels break the pattern. Published accuracies rest on it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmcompile import pruning
from nmcompile.config import CompileConfig
from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.low_bit import inner_convs
from nmcompile.paper.methods import Compiled, plain, weights_and_gradients
from nmcompile.paper.recipe import PAPER, QUICK

PATTERN = "2:4"
BLOCK = 4


class LooseTiles(nn.Module):
    """Weights masked in tiles of one out-channel each; the gradient passes to all of them."""

    def forward(self, w: Tensor) -> Tensor:
        tiles = w.detach().reshape(-1, BLOCK, BLOCK)
        mask = pruning.transposable_mask(tiles, PATTERN).view_as(w)
        return w + (torch.where(mask, w, 0.0) - w).detach()


def loose_tiles(model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
    """Mask every convolution except the first as the reference code does, at each step."""
    for conv in inner_convs(model):
        if conv.weight[0].numel() % BLOCK**2 == 0:
            parametrize.register_parametrization(conv, "weight", LooseTiles())
    yield model


EXPERIMENT = Comparison(
    name="tiles",
    title="Beyond the paper: true and loose tiles of transposable masks",
    rows=(
        Row("dense", plain),
        Row("row-wise 2:4", Compiled("weights", CompileConfig(refresh=1))),
        Row("true tiles", weights_and_gradients(None, None, refresh=1)),
        Row("loose tiles", loose_tiles),
    ),
    settings={"quick": Setting("images", "small", QUICK), "full": Setting("imagenet", "resnet18", PAPER)},
    caption=(
        "Test accuracy (%) with 2:4 weights: along the in-channels alone, transposable in tiles of 4 out-channels by 4 "
        "in-channels, and in tiles of 16 consecutive inputs of one out-channel, as the code of Hubara et al. has them. "
        "Masks follow every step; gradients are dense."
    ),
)
