"""Table 7: SDGP (McDanel et al. 2022) in the backward and in the update phase (Appendix A.4).

SDGP keeps the largest two of four gradients and rescales them. That is biased: fine for the gradient of the input, but
not for that of the weights. The paper trains here with FFCV's regime, which full scale does not: its baseline is 70.6.
"""

from nmcompile.config import CompileConfig
from nmcompile.layer_config import LayerConfig, Pruning
from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.methods import Compiled, plain
from nmcompile.paper.recipe import CONSTANT, PAPER
from nmcompile.pruning.pattern import NMPattern

SDGP = Pruning("sdgp", NMPattern(2, 4))
BACKWARD = CompileConfig(layers={"_default": LayerConfig(backward_gradient=SDGP)})
UPDATE = CompileConfig(layers={"_default": LayerConfig(update_gradient=SDGP)})

EXPERIMENT = Comparison(
    name="table7",
    title="Table 7: SDGP in the backward and in the update phase",
    rows=(
        Row("baseline", plain, 71.4),
        Row("SDGP backward", Compiled("gradients", BACKWARD), 71.2),
        Row("SDGP update", Compiled("gradients", UPDATE), 64.2),
    ),
    settings={"quick": Setting("images", "small", CONSTANT), "full": Setting("imagenet", "resnet18", PAPER)},
    orders=(("SDGP backward", "SDGP update"),),
    caption=(
        "Test accuracy (%) with SDGP 2:4 on the gradient that the backward GEMM reads (along channels), and on the one "
        "that the update GEMM reads (across the batch). The paper: ResNet-18 on ImageNet, with FFCV's training regime."
    ),
)
