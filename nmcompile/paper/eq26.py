"""Equation (26): two 2:4 operands leave one multiplication of four, on average (Section 5).

The expectation by enumeration of all pairs of masks, and the multiplications that the real masks of a small network
leave: weights and activations of a ResNet that was trained for an epoch. 4 bits on each side and a quarter of the
multiplications are as many bit operations (BOPs) as 2 bits on each side, so the paper compares with 2-bit networks.
"""

from collections import Counter
from itertools import combinations, product
from math import comb
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

import nmcompile
from nmcompile.config import CompileConfig, Phase
from nmcompile.demo.images import Images, load_images
from nmcompile.demo.resnet import ResNet
from nmcompile.demo.training import train
from nmcompile.ir.layers import ConvLayer
from nmcompile.layer_config import LayerConfig, Pruning
from nmcompile.paper.experiment import Analysis, Findings
from nmcompile.paper.operands import GemmCall, gemm_operands
from nmcompile.pruning.pattern import NMPattern

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATTERNS = ("1:2", "2:4", "4:8")
REAL = ("2:4", "4:8")
"""Patterns of the weights and of the activations that are pruned for real (Section 6.4)."""
IMAGES = 4000
BATCH = 64
BITS = 4
CAPTION = (
    "Multiplications (MACs) of a block in which both operands are N:M, by enumeration of all pairs of masks, and the "
    f"share of the MACs of each layer that is left with {REAL[0]} weights, {REAL[1]} activations after ReLU, and both: "
    f"a ResNet trained on {IMAGES:,} images for an epoch. Independent masks leave a quarter. BOPs: MACs times the bits "
    f"of both operands, as a share of dense {BITS}-bit ones; dense 2-bit operands have 25 %."
)


def mac_distribution(pattern: NMPattern) -> dict[int, float]:
    """Return the probability of each number of MACs of a block, if all masks are equally likely."""
    masks = [set(mask) for mask in combinations(range(pattern.block), pattern.n_keep)]
    counts = Counter(len(one & other) for one, other in product(masks, masks))
    return {macs: count / comb(pattern.block, pattern.n_keep) ** 2 for macs, count in sorted(counts.items())}


def expected_macs(pattern: NMPattern) -> float:
    """Return E[#MACs] of a block."""
    return sum(macs * probability for macs, probability in mac_distribution(pattern).items())


def real_calls(images: Images) -> list[GemmCall]:
    """Return the pruned forward GEMMs of a batch of the trained network."""
    torch.manual_seed(0)
    model = ResNet(images.train_images.shape[-1], int(images.train_labels.max()) + 1)
    train(model, images, min(IMAGES, len(images.train_images)), 1, 0, "eq26")
    weight, activation = (NMPattern.parse(text) for text in REAL)
    layer = LayerConfig(weight=Pruning("greedy", weight), input=Pruning("greedy_by_value", activation))
    x = images.test_images[:BATCH]
    config = CompileConfig(layers={"_default": layer})
    sparse = nmcompile.compile(model.eval(), "inference", args=(x,), config=config, backend="reference")
    with torch.no_grad():
        calls = gemm_operands(sparse, lambda: sparse(x))
    return [call for call in calls if call.phase is Phase.FORWARD and isinstance(call.layer, ConvLayer)]


def macs_left(call: GemmCall) -> tuple[float, float, float]:
    """Return the shares of a convolution's MACs whose weight, whose input and whose both factors are not zero."""
    x, w = (call.operands[name] != 0 for name in ("input", "weight"))
    every = _count(call, torch.ones_like(x), torch.ones_like(w))
    counts = (_count(call, *pair) for pair in ((torch.ones_like(x), w), (x, torch.ones_like(w)), (x, w)))
    one, other, both = (count / every for count in counts)
    return one, other, both


def _count(call: GemmCall, x: Tensor, w: Tensor) -> float:
    layer = call.layer
    assert isinstance(layer, ConvLayer)
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.conv2d(x.double(), w.double(), None, *geometry).sum().item()


def compute() -> Findings:
    rows: list[list[object]] = []
    for text in PATTERNS:
        pattern = NMPattern.parse(text)
        shares = f"{expected_macs(pattern) / pattern.block:.2%}"
        rows.append([f"{text} and {text}, enumerated", expected_macs(pattern), pattern.n_keep / 2, None, None, shares])
    distribution = {text: mac_distribution(NMPattern.parse(text)) for text in PATTERNS}
    calls = real_calls(load_images(None))
    left = {call.layer.name: macs_left(call) for call in calls}
    for name, shares3 in left.items():
        rows.append([name, None, None, *(f"{share:.2%}" for share in shares3)])
    headers = ["masks", "MACs a block", "the paper's N / 2", "of W", "of X", "of both (MACs, BOPs)"]
    data: dict[str, object] = {"distribution": distribution, "left": left}
    return Findings(headers, rows, CAPTION, lambda figure: draw(figure, left), data)


def draw(figure: "Figure", left: dict[str, tuple[float, float, float]]) -> None:
    axes = figure.add_subplot()
    for number, label in enumerate(("W non-zero", "X non-zero", "both non-zero")):
        heights = [index + 0.28 * (number - 1) for index in range(len(left))]
        axes.barh(heights, [100 * shares[number] for shares in left.values()], height=0.26, label=label)
    axes.axvline(25, color="black", linestyle="--", linewidth=1, label="independent masks")
    axes.set_yticks(range(len(left)), list(left))
    axes.invert_yaxis()
    axes.set_xlabel("MACs left, % of dense")
    figure.legend(fontsize="small", loc="outside right upper")


EXPERIMENT = Analysis("eq26", "Equation 26: expected MACs of two sparse operands", compute)
