"""Verification of the written file: it is read back and compared with torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx
from torch import nn

from nmcompile.errors import ExportError
from nmcompile.export.check.compare_layers import LayerCheck, check_layers
from nmcompile.export.check.compare_runtimes import RuntimeCheck, check_runtimes
from nmcompile.export.check.example import Example
from nmcompile.export.check.lockstep import Lockstep
from nmcompile.export.check.other_sizes import dims_of, other_sizes
from nmcompile.export.check.spell_out import spell_out
from nmcompile.export.deployed_layer import DeployedLayer
from nmcompile.export.write.write_onnx import OnnxReport
from nmcompile.files.open_onnx import OnnxFile, open_onnx
from nmcompile.files.read_weights import read_weights
from nmcompile.three_gemm.find_triples import triples_of


@dataclass(frozen=True)
class Verification:
    """Distance of a file from its model, per layer and per runtime; notes say what was not compared and why."""

    layers: tuple[LayerCheck, ...]
    runtimes: tuple[RuntimeCheck, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        steps = max((check.most_steps for check in self.layers if check.is_quantized), default=0.0)
        lines = [f"{len(self.layers)} layers fed the same input: at most {steps:.4f} quantization steps apart"]
        return "\n".join([*lines, *map(str, self.runtimes), *self.notes])


def verify_onnx(
    report: OnnxReport, layers: Mapping[str, DeployedLayer], model: nn.Module, batches: Sequence[Example]
) -> Verification:
    """Compare a file with the model it was made from: zeros, then layer by layer, then end to end.

    Args:
        report: the writer's report.
        layers: the layers that the writer was given.
        model: the torch model whose outputs the file should give: weights and inputs pruned and quantized, in eval().
        batches: arguments of the model.

    Raises:
        ExportError: names the first layer, or the runtime, that differs.
        FileError: the file is damaged.
    """
    file = open_onnx(report.path)
    _check_zeros(file, report, layers)
    proto = spell_out(file.proto if file.path is None else onnx.load(file.path))
    checks = check_layers(proto, report.nodes, layers, model, lambda: batches[0].run(model), report.target)
    calls = Counter(node.layer for node in report.nodes)
    called = {node.layer for node in report.nodes if node.name in {check.node for check in checks}}
    projected = {triple.layer.name for triple in triples_of(model) if triple.site.role}
    nodes = [node for node in report.nodes if calls[node.layer] == 1 and node.layer in called | projected]
    lockstep = partial(Lockstep, proto, nodes, layers, model, report.target)
    others, said = other_sizes(dims_of(file.proto.graph), report.ranges, batches[0], model)
    runtimes, notes = check_runtimes(file, report.target, model, [*batches, *others], lockstep)
    return Verification(checks, runtimes, (*said, *notes))


def _check_zeros(file: OnnxFile, report: OnnxReport, layers: Mapping[str, DeployedLayer]) -> None:
    patterns = {node.name: layers[node.layer].weight.pattern for node in report.nodes}
    unseen = {name for name, pattern in patterns.items() if pattern is not None}
    for weight in read_weights(file):
        pattern = patterns.get(weight.node)
        if pattern is None or weight.hidden_by:
            continue
        unseen.discard(weight.node)
        broken = weight.violations(pattern)
        if broken:
            raise ExportError(f"layer {weight.node!r}: {broken} blocks of {weight.initializer!r} break {pattern}")
    if unseen:
        raise ExportError(f"layer {min(unseen)!r}: no constant weight is seen in {report.path.name}")
