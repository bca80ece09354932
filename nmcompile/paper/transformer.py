"""Beyond the paper: a Transformer on text, with all three GEMMs of its linear layers sparse."""

from dataclasses import replace

from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.methods import gradients, plain, weights_and_gradients
from nmcompile.paper.recipe import Recipe

QUICK = Recipe(epochs=5, batch=32, rate=3e-3, decay=0.01, optimizer="adamw", images=2000)
FULL = replace(QUICK, epochs=10, images=None)

EXPERIMENT = Comparison(
    name="transformer",
    title="Beyond the paper: a Transformer on text",
    rows=(
        Row("dense", plain),
        Row("W 2:4", weights_and_gradients(None, None)),
        Row("G 2:4", gradients("mvue", "2:4")),
        Row("W 2:4, G 2:4", weights_and_gradients("mvue", "2:4")),
    ),
    settings={"quick": Setting("text", "transformer", QUICK), "full": Setting("text", "transformer", FULL)},
    caption=(
        "Test loss (nats a character) after each epoch of a Transformer (two blocks of width 128, GELU) on the King "
        "James Bible: dense, with transposable 2:4 weights (W), with MVUE 2:4 gradients along the tokens (G), and "
        "with both: mean and range of the seeds."
    ),
    metric="loss",
    curves=True,
)
