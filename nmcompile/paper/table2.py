"""Table 2: 1:2 pruning of the neural gradients, ResNet-18 on CIFAR-10 (Section 4.1).

Greedy keeps the larger of two, biased draws as MVUE does but leaves values alone, uniform draws evenly, unbiased
doubles what an even draw keeps, and MVUE is the minimum-variance unbiased estimator of Equation (7).

The paper does not say how it trained on CIFAR-10, and its baseline is 90 %. At quick scale the learning rate stays
constant: if it falls to zero within a few epochs, all of the operators recover (`settled`).
"""

from dataclasses import replace

from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.methods import gradients, plain
from nmcompile.paper.recipe import CONSTANT, PAPER

EXPERIMENT = Comparison(
    name="table2",
    title="Table 2: 1:2 pruning of the neural gradients",
    rows=(
        Row("baseline", plain, 90.02),
        Row("greedy", gradients("greedy", "1:2"), 85.5),
        Row("biased", gradients("biased", "1:2"), 71.8),
        Row("uniform", gradients("uniform", "1:2"), 85.8),
        Row("unbiased", gradients("unbiased", "1:2"), 87.2),
        Row("MVUE", gradients("mvue", "1:2"), 89.98),
    ),
    settings={
        "quick": Setting("images", "small", CONSTANT),
        "full": Setting("images", "resnet18-cifar", replace(PAPER, decay=5e-4)),
    },
    orders=(("MVUE", "unbiased"), ("unbiased", "uniform"), ("unbiased", "greedy"), ("greedy", "biased")),
    caption=(
        "Test accuracy (%) with the gradients of the update GEMM pruned to 1:2 across the batch, by operator. "
        "The paper: ResNet-18 on CIFAR-10."
    ),
)
