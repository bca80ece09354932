"""Figure 6: ResNeXt-50, whose convolutions run in groups, loses a point with MVUE 1:2 gradients (Appendix A.3)."""

from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.methods import gradients, plain
from nmcompile.paper.recipe import CONSTANT, PAPER

EXPERIMENT = Comparison(
    name="fig6",
    title="Figure 6: grouped convolutions with MVUE 1:2 gradients",
    rows=(Row("baseline", plain), Row("MVUE 1:2", gradients("mvue", "1:2"))),
    settings={"quick": Setting("images", "small-resnext", CONSTANT), "full": Setting("imagenet", "resnext50", PAPER)},
    caption=(
        "Test accuracy (%) after each epoch of a network of bottleneck blocks with grouped convolutions: mean and "
        "range of the seeds. The paper (ResNeXt-50, ImageNet): MVUE 1:2 loses 1 point."
    ),
    curves=True,
)
