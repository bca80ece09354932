"""Beyond the paper: what of Table 2 is due to batch statistics that lag behind the weights (see `drift`).

Here the runs of Table 2 train for one more epoch with a learning rate of zero: only the running statistics of batch
norm move, until they fit the weights.
"""

from dataclasses import replace

from nmcompile.paper import table2
from nmcompile.paper.comparison import Comparison, Setting
from nmcompile.paper.methods import Twice
from nmcompile.paper.recipe import CONSTANT
from nmcompile.paper.train import Phase

LONGER = replace(CONSTANT, epochs=CONSTANT.epochs + 1)
TRAINED, STILL = Phase(CONSTANT.epochs / LONGER.epochs), Phase(1 / LONGER.epochs, rate=0.0)
ROWS = ("baseline", "greedy", "biased", "MVUE")

EXPERIMENT = Comparison(
    name="settled",
    title="Beyond the paper: Table 2 with settled batch statistics",
    rows=tuple(
        replace(row, method=Twice(row.method), phases=(TRAINED, STILL), paper=None)
        for row in table2.EXPERIMENT.rows
        if row.name in ROWS
    ),
    settings={"quick": Setting("images", "small", LONGER)},
    caption=(
        "Test accuracy (%) after each epoch with gradients pruned to 1:2 as in Table 2. In the last epoch the learning "
        "rate is zero: only the running statistics of batch norm move. Mean and range of the seeds."
    ),
    curves=True,
)
