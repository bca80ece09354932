"""Table 5: 4-bit 2:4 weights and 4:8 activations against 2-bit quantization (Section 6.4).

Scheme A trains sparse and with 4 bits from scratch. Scheme B trains with sparse activations first, fixes the masks of
the weights, and goes on with 4 bits. A quarter of the multiplications with 4 bits are as many BOPs as 2 bits, so the
paper compares with three methods of 2-bit training. Rows with two phases spend half of the epochs in full precision,
the other half quantized, at a fifth of the learning rate; the baseline has the same two rates.
"""

from dataclasses import replace

from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.fig5 import AFTER_RELU
from nmcompile.paper.low_bit import lsq, pact, qil
from nmcompile.paper.methods import Twice, plain, scheme_a, scheme_b
from nmcompile.paper.recipe import PAPER, QUICK
from nmcompile.paper.train import Phase

HALVES = (Phase(0.5), Phase(0.5, rate=0.2))

EXPERIMENT = Comparison(
    name="table5",
    title="Table 5: 4-bit N:M networks against 2-bit ones",
    rows=(
        Row("baseline", Twice(plain), 70.6, HALVES),
        Row("4:8 activations", Twice(AFTER_RELU), 70.6, HALVES),
        Row("scheme A", scheme_a, 66.5),
        Row("scheme B", scheme_b, 67.33, HALVES),
        Row("PACT 2-bit", pact, 64.4, HALVES),
        Row("QIL 2-bit", qil, 65.7, HALVES),
        Row("LSQ 2-bit", lsq, 66.9, HALVES),
    ),
    settings={
        "quick": Setting("images", "small", replace(QUICK, epochs=4)),
        "full": Setting("imagenet", "resnet18", PAPER),
    },
    orders=tuple(("scheme B", row) for row in ("PACT 2-bit", "QIL 2-bit", "LSQ 2-bit", "scheme A")),
    caption=(
        "Test accuracy (%) with 2:4 weights, 4:8 activations and 4 bits (schemes A and B), and with 2 bits and no "
        "sparsity (PACT, QIL, LSQ), the first convolution and the last linear layer in full precision. "
        "The paper: ResNet-18 on ImageNet."
    ),
)
