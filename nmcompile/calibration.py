"""Find the clips of quantized activations from example data."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from nmcompile.compilation import record_of
from nmcompile.config import Phase
from nmcompile.errors import CalibrationError
from nmcompile.ir import operations as ops
from nmcompile.ir.absorbed_norm import AbsorbedNorm
from nmcompile.ir.grid_steps import ActivationStep
from nmcompile.ir.interpretation import interpreted
from nmcompile.ir.three_gemm import GemmTriple
from nmcompile.quantization import Histogram
from nmcompile.training.state import triples_of

PERCENTILE = 99.99
FACTORS = (1.0, 0.9, 1.1, 0.8, 1.2, 0.7, 0.6, 0.5)  # of equally good ones the first, as where no output is a float
COARSE = 4  # bits; on finer grids rounding is no error to balance clipping with
EXAMPLES = 8  # batches whose outputs are kept to choose among them


@torch.no_grad()
def calibrate(compiled: nn.Module, data: Iterable[Any]) -> None:
    """Set the clip of every quantized activation from a pass over `data`, in eval mode and with none of them quantized.

    The histogram of each activation (after its pruning) is searched for the clip of the least squared error. That says
    which clips fit together, but not how much clipping the model bears: errors of rounding add up through the layers
    otherwise than errors of clipping. So all clips of coarse grids are then multiplied by the one factor with the least
    squared error of the model's outputs on the first batches. Learned clips start from there. With
    `CompileConfig(clip="percentile")` each clip is the percentile 99.99 of its activation.

    Args:
        compiled: a model compiled with a mode that quantizes inputs.
        data: batches: a tensor; a dict of keyword arguments; or a tuple or list such as a `DataLoader`'s
            (inputs, labels), whose first entry is the input, or a tuple of the arguments.

    Raises:
        CalibrationError: no data, data with NaN or infinity, or an input that is always zero; it names the layer.
        StateError: the model is not compiled.
    """
    if not any(triples_of(compiled)):
        record_of(compiled)
    steps = {id(step): step for triple in triples_of(compiled) for step in triple.steps.activations}
    with evaluating(compiled):
        observed, examples = _observe(compiled, data)
        clips = {key: _clip(step, observed[key]) for key, step in steps.items()}
        for key, step in steps.items():
            step.calibrate(clips[key])
        coarse = [step for step in steps.values() if step.grid.bits <= COARSE]
        _scale_clips(compiled, [step for step in coarse if step.row.operator != "percentile"], examples)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; behind, in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _observe(compiled: nn.Module, data: Iterable[Any]) -> tuple[dict[int, Histogram], list[tuple[Any, list[Tensor]]]]:
    """What each input holds, and some batches with the outputs that they have unquantized."""
    observed: dict[int, Histogram] = defaultdict(Histogram)
    examples: list[tuple[Any, list[Tensor]]] = []
    observing = interpreted(triples_of(compiled), lambda triple, phase: _Observer(triple, phase, observed))
    with observing, _observed_norms(compiled, observed):
        for batch in tqdm(data, desc="calibrating", unit="batch", leave=False, disable=None):
            outputs = _floats(run_batch(compiled, batch))
            if len(examples) < EXAMPLES:
                examples.append((batch, outputs))
    return observed, examples


@contextmanager
def _observed_norms(model: nn.Module, observed: dict[int, Histogram]) -> Iterator[None]:
    """Inside, absorbed norms round nothing, and show what their grids would get to histograms."""
    norms = [module for module in model.modules() if isinstance(module, AbsorbedNorm)]
    for norm in norms:
        step = norm.absorbing_layer.three_gemms[""].steps.output
        norm.__dict__.update(to_grid=partial(_note, step, observed), to_accumulator=_unrounded)
    try:
        yield
    finally:
        for norm in norms:
            del norm.__dict__["to_grid"], norm.__dict__["to_accumulator"]


def _unrounded(shift: Tensor, gain: Tensor) -> Tensor:
    return shift


def _note(step: ActivationStep | None, observed: dict[int, Histogram], x: Tensor) -> Tensor:
    if step is not None:
        observed[id(step)].observe(x)
    return x


def _scale_clips(compiled: nn.Module, steps: list[ActivationStep], examples: list[tuple[Any, list[Tensor]]]) -> None:
    """Multiply all clips by the factor that serves the model's outputs best."""
    local = [step.clip.clone() for step in steps]

    def error(factor: float) -> float:
        for step, clip in zip(steps, local, strict=True):
            step.calibrate(factor * clip)
        pairs = (zip(_floats(run_batch(compiled, batch)), outputs, strict=True) for batch, outputs in examples)
        return sum(_squared_error(ours, exact) for pair in pairs for ours, exact in pair)

    best = min(FACTORS, key=error) if steps else 1.0
    for step, clip in zip(steps, local, strict=True):
        step.calibrate(best * clip)


def _squared_error(ours: Tensor, exact: Tensor) -> float:
    """Of what is finite: outputs may be masked with an infinity."""
    error = float((ours - exact)[exact.isfinite()].double().square().sum())
    return math.inf if math.isnan(error) else error


def _floats(output: Any) -> list[Tensor]:
    """The floating-point tensors that a model returns, in any structure."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with what a loader yields."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, dict):
        return model(**batch)
    inputs = batch[0]
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


class _Observer(fx.Interpreter):
    """Runs the forward graph with unquantized activations, and shows what its grids would get to histograms."""

    def __init__(self, triple: GemmTriple, phase: Phase, observed: dict[int, Histogram]) -> None:
        super().__init__(triple.graphs[phase])
        self.steps = {step.row.operand: step for step in triple.steps.activations}
        self.observed = observed

    def run_node(self, n: fx.Node) -> Any:
        if n.target is ops.to_accumulator:
            return self.env[n.all_input_nodes[0]]
        row = n.meta.get("row")
        if row is None or not row.is_quantized or row.operand not in self.steps:
            return super().run_node(n)
        x = self.env[n.all_input_nodes[0]]
        self.observed[id(self.steps[row.operand])].observe(x)
        return x


def _clip(step: ActivationStep, histogram: Histogram) -> float:
    try:
        if step.row.operator == "percentile":
            return histogram.percentile(PERCENTILE)
        return histogram.best_clip(step.grid)
    except CalibrationError as error:
        raise CalibrationError(f"layer {step.layer!r}: {error}") from error
