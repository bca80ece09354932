"""When the mask of a weight is rebuilt: Hubara et al. (2021) do so every 40 steps; beyond the paper.

All masked rows are the paper's training configuration, transposable 2:4 weights and MVUE 2:4 gradients.
"""

from dataclasses import replace

from nmcompile.config import CompileConfig
from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.methods import Compiled, plain
from nmcompile.paper.recipe import PAPER, QUICK

LARGER = replace(QUICK, batch=128, images=20_000)
DENSE = Row("dense", plain)
HUBARA = Row("every 40 steps", Compiled("training", CompileConfig(refresh=40)))
EACH = Row("every step", Compiled("training", CompileConfig(refresh=1)))
FIRST = Row("first mask", Compiled("training", CompileConfig(refresh=None)))
STEADY = Row("steady", Compiled("training", CompileConfig(refresh="steady")))

EXPERIMENT = Comparison(
    name="refresh",
    title="When masks are rebuilt",
    rows=(DENSE, HUBARA, EACH, FIRST, STEADY),
    settings={"quick": Setting("images", "small", LARGER), "full": Setting("images", "resnet18-cifar", PAPER)},
    caption=(
        "Test accuracy (%) in training mode, minus that of dense training, by the rule for masks: recomputed every 40 "
        "steps or every step, the first one kept, or steady (the default)."
    ),
)
LONG = Comparison(
    name="refresh-long",
    title="Steady masks, ten times as long",
    rows=(DENSE, STEADY),
    settings={"quick": Setting("images", "small", replace(LARGER, epochs=30))},
    caption=(
        "Test accuracy (%) after each epoch, dense and in training mode with steady masks (the default): mean and "
        "range of the seeds."
    ),
    curves=True,
)
