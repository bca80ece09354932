"""Comparison of a compiled model with the dense one on the same batch, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nmcompile.api.compile import compile as compile_model
from nmcompile.checks import check_compiled, check_kind
from nmcompile.config import Phase
from nmcompile.errors import ConfigError
from nmcompile.printable import table
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import Observer, Results, Values, observing
from nmcompile.three_gemm.run_model import run_batch
from nmcompile.three_gemm.triple import GemmTriple


@dataclass(frozen=True)
class LayerDifference:
    """One layer's output compared with the dense model's: signal to noise in decibels, and the cosine of the two."""

    layer: str
    sqnr: float
    cosine: float


@dataclass(frozen=True)
class CompareReport:
    """The layers in call order. The difference of a later layer includes the errors of earlier ones."""

    layers: tuple[LayerDifference, ...]

    def __str__(self) -> str:
        rows = [[layer.layer, layer.sqnr, layer.cosine] for layer in self.layers]
        return table(rows, headers=["layer", "SQNR, dB", "cosine"], floatfmt=("", ".1f", ".4f"))


@torch.no_grad()
def compare(dense: nn.Module, compiled: nn.Module, batch: object) -> CompareReport:
    """Run both models in their present modes, and compare the outputs of their layers.

    Args:
        dense: the plain model, or a compiled one that serves as the reference.
        compiled: the compiled model.
        batch: as in `calibrate`.

    Raises:
        ConfigError: the models share no layer.
        CalibrationError: a quantized input has no clip yet, or a model does not run on the batch.
    """
    check_kind("dense", dense, nn.Module, "the plain model, or a compiled one that serves as the reference")
    check_compiled("compiled", compiled)
    reference = dense if any(triples_of(dense)) else compile_model(dense, "dense")
    expected, actual = _outputs(reference, batch), _outputs(compiled, batch)
    shared = [name for name in actual if name in expected]
    if not shared:
        raise ConfigError(f"no layer of {type(compiled).__name__} has the name of one of {type(dense).__name__}")
    return CompareReport(tuple(_difference(name, expected[name], actual[name]) for name in shared))


def _outputs(model: nn.Module, batch: object) -> Mapping[str, list[Tensor]]:
    outputs: dict[str, list[Tensor]] = {}
    for triple in triples_of(model):
        triple.steps.check()
    with observing(triples_of(model), lambda triple: _Recorder(triple, outputs)):
        run_batch(model, batch)
    return outputs


class _Recorder(Observer):
    """An observer that keeps the results of each forward graph."""

    def __init__(self, triple: GemmTriple, outputs: dict[str, list[Tensor]]) -> None:
        super().__init__(triple)
        self.outputs = outputs

    def run(self, phase: Phase, values: Values) -> Results:
        result = super().run(phase, values)
        if phase is Phase.FORWARD and result[0] is not None:
            self.outputs.setdefault(self.triple.layer.name, []).append(result[0].detach())
        return result


def _difference(name: str, expected: list[Tensor], actual: list[Tensor]) -> LayerDifference:
    x, y = (torch.cat([output.double().flatten() for output in outputs]) for outputs in (expected, actual))
    noise = (x - y).square().sum()
    sqnr = 10 * torch.log10(x.square().sum() / noise)
    return LayerDifference(name, float(sqnr), float(torch.cosine_similarity(x, y, dim=0)))
