"""Beyond the paper: estimators of other forms and patterns, in accuracy.

Exact MVUE 2:4 by systematic sampling, by the pairs of Appendix A.2, and the approximation have the same expectation;
the first two have the same variance too. 4:8 has less variance, 1:4 more.
"""

from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.methods import gradients, plain
from nmcompile.paper.recipe import CONSTANT, PAPER

EXPERIMENT = Comparison(
    name="estimators",
    title="Beyond the paper: estimators of the neural gradients",
    rows=(
        Row("baseline", plain),
        Row("MVUE 4:8", gradients("mvue", "4:8")),
        Row("MVUE 2:4", gradients("mvue", "2:4")),
        Row("MVUE 2:4, pairs of A.2", gradients("mvue_pairs", "2:4")),
        Row("approx-MVUE 2:4", gradients("mvue_approx", "2:4")),
        Row("MVUE 1:2", gradients("mvue", "1:2")),
        Row("MVUE 1:4", gradients("mvue", "1:4")),
    ),
    settings={"quick": Setting("images", "small", CONSTANT), "full": Setting("imagenet", "resnet18", PAPER)},
    caption="Test accuracy (%) with the gradients of the update GEMM pruned by each estimator and pattern.",
)
