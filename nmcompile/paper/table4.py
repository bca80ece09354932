"""Table 4: 4:8 activations after ReLU, ResNet-18 and ResNet-50 (Section 6.3)."""

from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.fig5 import AFTER_RELU
from nmcompile.paper.methods import plain
from nmcompile.paper.recipe import PAPER, QUICK


def rows(r18: str, r50: str) -> tuple[Row, ...]:
    return (
        Row("R18: dense", plain, 70.6, network=r18),
        Row("R18: 4:8", AFTER_RELU, 70.6, network=r18),
        Row("R50: dense", plain, 76.6, network=r50),
        Row("R50: 4:8", AFTER_RELU, 76.45, network=r50),
    )


EXPERIMENT = Comparison(
    name="table4",
    title="Table 4: 4:8 activations",
    settings={
        "quick": Setting("images", "small", QUICK, rows("small", "small-bottleneck")),
        "full": Setting("imagenet", "resnet18", PAPER, rows("resnet18", "resnet50")),
    },
    caption=(
        "Test accuracy (%) with 4:8 pruning by value after each ReLU that a convolution reads; R18 has basic blocks, "
        "R50 bottleneck blocks. The paper: ResNet-18 and ResNet-50 on ImageNet."
    ),
)
