"""Figure 4: ResNet-50 loses 0.8 points with MVUE 1:2 gradients and nothing with approx-MVUE 2:4 (Section 6.1)."""

from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.methods import gradients, plain
from nmcompile.paper.recipe import CONSTANT, PAPER

EXPERIMENT = Comparison(
    name="fig4",
    title="Figure 4: bottleneck blocks with MVUE 1:2 and approx-MVUE 2:4 gradients",
    rows=(
        Row("baseline", plain),
        Row("MVUE 1:2", gradients("mvue", "1:2")),
        Row("approx-MVUE 2:4", gradients("mvue_approx", "2:4")),
    ),
    settings={"quick": Setting("images", "small-bottleneck", CONSTANT), "full": Setting("imagenet", "resnet50", PAPER)},
    orders=(("approx-MVUE 2:4", "MVUE 1:2"),),
    caption=(
        "Test accuracy (%) after each epoch of a network of bottleneck blocks, gradients pruned in the update GEMM: "
        "mean and range of the seeds. The paper (ResNet-50, ImageNet): MVUE 1:2 loses 0.8 points, approx-MVUE 2:4 none."
    ),
    curves=True,
)
