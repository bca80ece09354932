"""Figure 3: MVUE 1:2 keeps the baseline's accuracy where greedy 2:4 pruning of the gradients does not (Section 6.1)."""

from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.methods import gradients, plain
from nmcompile.paper.recipe import CONSTANT, PAPER

EXPERIMENT = Comparison(
    name="fig3",
    title="Figure 3: MVUE 1:2 and greedy 2:4 gradients",
    rows=(
        Row("baseline", plain),
        Row("MVUE 1:2", gradients("mvue", "1:2")),
        Row("greedy 2:4", gradients("greedy", "2:4")),
    ),
    settings={"quick": Setting("images", "small", CONSTANT), "full": Setting("imagenet", "resnet18", PAPER)},
    orders=(("MVUE 1:2", "greedy 2:4"),),
    caption=(
        "Test accuracy (%) after each epoch with pruned gradients in the update GEMM: mean and range of the seeds. "
        "The paper (ResNet-18, ImageNet): MVUE 1:2 has no degradation, greedy 2:4 a big one."
    ),
    curves=True,
)
