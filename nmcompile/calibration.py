"""Find the clips of quantized inputs from example data."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from nmcompile.config import Phase
from nmcompile.errors import CalibrationError
from nmcompile.ir.grid_steps import InputStep
from nmcompile.ir.interpretation import interpreted
from nmcompile.ir.three_gemm import GemmTriple
from nmcompile.quantization import Histogram
from nmcompile.training.state import triples_of

PERCENTILE = 99.99


@torch.no_grad()
def calibrate(compiled: nn.Module, data: Iterable[Any]) -> None:
    """Set the clip of every quantized input from a pass over `data`, in eval mode and with unquantized inputs.

    The histogram of each input (after its pruning) is searched for the clip of the least squared error, or of the
    percentile 99.99 where `CompileConfig(clip="percentile")` asks for it. A learned clip starts from the first.

    Args:
        compiled: a model compiled with a mode that quantizes inputs.
        data: batches: a tensor; a dict of keyword arguments; or a tuple or list such as a `DataLoader`'s
            (inputs, labels), whose first entry is the input, or a tuple of the arguments.

    Raises:
        CalibrationError: no data, data with NaN or infinity, or an input that is always zero; it names the layer.
    """
    triples = [triple for triple in triples_of(compiled) if triple.steps.input is not None]
    observed = {id(triple): Histogram() for triple in triples}
    modes = {module: module.training for module in compiled.modules()}
    compiled.eval()
    try:
        with interpreted(triples, lambda triple, phase: _Observer(triple, phase, observed[id(triple)])):
            for batch in tqdm(data, desc="calibrating", unit="batch", leave=False, disable=None):
                run_batch(compiled, batch)
    finally:
        for module, training in modes.items():
            module.training = training
    for triple in triples:
        assert triple.steps.input is not None
        triple.steps.input.calibrate(_clip(triple.steps.input, observed[id(triple)]))


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with what a loader yields."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, dict):
        return model(**batch)
    inputs = batch[0]
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


class _Observer(fx.Interpreter):
    """Runs the forward graph with its input unquantized, and shows that input to a histogram."""

    def __init__(self, triple: GemmTriple, phase: Phase, histogram: Histogram) -> None:
        super().__init__(triple.graphs[phase])
        self.histogram = histogram

    def run_node(self, n: fx.Node) -> Any:
        row = n.meta.get("row")
        if row is None or not (row.is_quantized and row.operand == "input"):
            return super().run_node(n)
        x = self.env[n.all_input_nodes[0]]
        self.histogram.observe(x)
        return x


def _clip(step: InputStep, histogram: Histogram) -> float:
    try:
        if step.row.operator == "percentile":
            return histogram.percentile(PERCENTILE)
        return histogram.best_clip(step.grid)
    except CalibrationError as error:
        raise CalibrationError(f"layer {step.layer!r}: {error}") from error
