"""Calibration of the clips of quantized activations from example data."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from nmcompile.checks import check_compiled
from nmcompile.errors import CalibrationError
from nmcompile.quantization import Histogram
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.grid_steps import ActivationStep
from nmcompile.three_gemm.observer import observing
from nmcompile.three_gemm.record import record_of
from nmcompile.three_gemm.run_model import evaluating, run_batch, shown
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.three_gemm.unquantized import Unquantized

PERCENTILE = 99.99
FACTORS = (1.0, 0.9, 1.1, 0.8, 1.2, 0.7, 0.6, 0.5)  # the first of equally good ones wins, as if no output is a float
COARSE = 4  # bits; on finer grids the rounding error is too small to balance against clipping
EXAMPLES = 8  # batches whose outputs decide about the factor


@torch.no_grad()
def calibrate(compiled: nn.Module, data: Iterable[object]) -> None:
    """Set the clip of every quantized activation from a pass over `data`, in eval mode and with none of them quantized.

    The histogram of each activation (after its pruning) is searched for the clip with the least squared error. That
    says which clips fit together, but not how much clipping the model bears: rounding errors and clipping errors add up
    differently through the layers. So all clips of coarse grids are then multiplied by one factor, the one with the
    least squared error of the model's outputs on the first batches. Learned clips start from there. With
    `CompileConfig(clip="percentile")` each clip is the percentile 99.99 of its activation.

    Args:
        compiled: a model compiled with a mode that quantizes inputs.
        data: batches, each a tensor; a mapping of forward's arguments by name (a dict, a `BatchEncoding`), of which
            entries that forward does not take, such as labels, are left out; or a tuple or list as a `DataLoader`
            yields it. Its first entry is then a tensor, such a mapping, or a tuple or list of forward's arguments.
            If forward requires several arguments, that many first entries are taken: (a, b, label) for
            `forward(a, b)`. Optional arguments are given by name, or nested: ((x, mask), label).

    Raises:
        CalibrationError: no data; a batch that forward does not run on, or that gives NaN or infinity, by its number;
            an input that is always zero, by its layer; or layers that the data does not reach.
        StateError: the model is not compiled.
    """
    unreached = calibrate_reached(compiled, data)
    if unreached:
        names = ", ".join(map(repr, unreached))
        raise CalibrationError(
            f"the calibration data runs the model without calling {names}; give data that reaches "
            f"{'it' if len(unreached) == 1 else 'them'}, or leave {names} dense with "
            f"CompileConfig(layers={dict.fromkeys(unreached)})"
        )


@torch.no_grad()
def calibrate_reached(
    compiled: nn.Module, data: Iterable[object], settled: Collection[ActivationStep] = ()
) -> tuple[str, ...]:
    """Calibrate as `calibrate` does, and return the names of the layers that the data does not reach.

    These layers keep their clips, and so do steps that are settled.
    """
    check_compiled("compiled", compiled)
    if not any(triples_of(compiled)):
        record_of(compiled)
    check_data(data)
    steps = {id(step): step for triple in triples_of(compiled) for step in triple.steps.activations}
    steps = {key: step for key, step in steps.items() if step not in settled}
    with evaluating(compiled):
        observed, examples = _observe(compiled, data, steps)
        reached = {key: step for key, step in steps.items() if key in observed} or steps
        clips = {key: _clip(step, observed[key]) for key, step in reached.items()}
        for key, step in reached.items():
            step.calibrate(clips[key])
        coarse = [step for step in reached.values() if step.grid.bits <= COARSE]
        _scale_clips(compiled, [step for step in coarse if step.row.operator != "percentile"], examples)
    missed = (step for key, step in steps.items() if key not in reached and not step.is_calibrated)
    return tuple(dict.fromkeys(step.layer for step in missed))


def check_data(data: object) -> None:
    """Raise for a single batch: the rows of a tensor and the keys of a mapping are not batches."""
    if isinstance(data, Tensor | np.ndarray | Mapping | str | bytes) or not isinstance(data, Iterable):
        raise CalibrationError(f"the calibration data is {shown(data)}; give an iterable of batches, such as [batch]")


def _observe(
    compiled: nn.Module, data: Iterable[object], steps: Mapping[int, ActivationStep]
) -> tuple[dict[int, Histogram], list[tuple[object, list[Tensor]]]]:
    """Return histograms of all inputs, and some batches with their unquantized outputs."""
    observed: dict[int, Histogram] = defaultdict(Histogram)
    examples: list[tuple[object, list[Tensor]]] = []
    with observing(triples_of(compiled), lambda triple: _Recording(triple, observed)):
        bar = tqdm(data, desc="calibrating", unit="batch", leave=False, disable=None)
        for number, batch in enumerate(bar):
            outputs = floats_of(run_batch(compiled, batch, f"calibration batch {number}"))
            _check_finite(observed, steps, f"calibration batch {number}, {shown(batch)},")
            if len(examples) < EXAMPLES:
                examples.append((batch, outputs))
    return observed, examples


def _check_finite(observed: Mapping[int, Histogram], steps: Mapping[int, ActivationStep], batch: str) -> None:
    """Raise for the first layer in call order that a batch gave NaN or infinity."""
    broken = next((steps[key].layer for key, histogram in observed.items() if not histogram.is_finite), None)
    if broken is not None:
        raise CalibrationError(f"layer {broken!r}: {batch} gives NaN or infinity here; remove such samples")


def _scale_clips(compiled: nn.Module, steps: list[ActivationStep], examples: list[tuple[object, list[Tensor]]]) -> None:
    """Multiply all clips by the factor that serves the model's outputs best."""
    local = [step.clip.clone() for step in steps]

    def error(factor: float) -> float:
        for step, clip in zip(steps, local, strict=True):
            step.calibrate(factor * clip)
        pairs = (zip(floats_of(run_batch(compiled, batch)), outputs, strict=True) for batch, outputs in examples)
        return sum(squared_error(ours, exact) for pair in pairs for ours, exact in pair)

    best = min(FACTORS, key=error) if steps else 1.0
    for step, clip in zip(steps, local, strict=True):
        step.calibrate(best * clip)


def squared_error(ours: Tensor, exact: Tensor) -> float:
    """Return the squared error of the finite outputs: outputs may be masked with an infinity."""
    error = float((ours - exact)[exact.isfinite()].double().square().sum())
    return math.inf if math.isnan(error) else error


def squared_norm(exact: Tensor) -> float:
    """Return the squared norm of the finite outputs, which `squared_error` is compared with."""
    return float(exact[exact.isfinite()].double().square().sum())


def floats_of(output: object) -> list[Tensor]:
    """Return the floating-point tensors that a model returns, in any structure."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


class _Recording(Unquantized):
    """An observer that adds the activations which grids would quantize to histograms."""

    def __init__(self, triple: GemmTriple, observed: dict[int, Histogram]) -> None:
        super().__init__(triple)
        self.observed = observed

    def show(self, step: ActivationStep, x: Tensor) -> None:
        self.observed[id(step)].observe(x)


def _clip(step: ActivationStep, histogram: Histogram) -> float:
    try:
        if step.row.operator == "percentile":
            return histogram.percentile(PERCENTILE)
        return histogram.best_clip(step.grid)
    except CalibrationError as error:
        raise CalibrationError(f"layer {step.layer!r}: {error}") from error
