"""Comparison of each layer of an exported file with the same layer in torch, given the same input."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from torch import Tensor, nn

from nmcompile.errors import ExportError
from nmcompile.export.check.array_difference import difference, finite
from nmcompile.export.check.extract_layer import LayerPart
from nmcompile.export.check.record_calls import record_calls
from nmcompile.export.check.run_file import onnxruntime_runner
from nmcompile.export.deployed_layer import DeployedLayer
from nmcompile.export.write.find_layers import CONVS
from nmcompile.export.write.write_onnx import ExportedNode

RELATIVE_L2 = 1e-2
MOST_STEPS = 1.0
HALF = 0.5
ROUNDING = 2.0**-23  # twice the relative error of one float32 rounding
EQUAL = 0.999


@dataclass(frozen=True)
class LayerCheck:
    """One node compared with its module.

    Attributes:
        node: the node's name.
        most_steps: the difference in steps that exceeds rounding the most; for layers in floating point the relative L2
            difference. The step is the accumulator's, input scale times weight scale, or a quantized output's.
            If an output is pruned, elements that only one side keeps (a tie but for rounding) do not count.
        equal: the fraction of outputs less than half a step apart, or less than `rounding` if that is more.
        outputs: the number of outputs. Of fewer than 1000, one may differ: a value next to the middle of two steps.
        rounding: steps by which two float32 sums may differ there: as much as one rounding of the channel's largest
            result, times the square root of the sum's length (after N. Higham and T. Mary's probabilistic bound).
    """

    node: str
    most_steps: float
    equal: float
    is_quantized: bool
    outputs: int
    rounding: float = 0.0

    @property
    def ok(self) -> bool:
        if not self.is_quantized:
            return self.most_steps <= RELATIVE_L2
        different = round((1 - self.equal) * self.outputs)
        return self.most_steps <= MOST_STEPS + self.rounding and different <= max(1.0, (1 - EQUAL) * self.outputs)


def check_layers(
    proto: onnx.ModelProto,
    nodes: Sequence[ExportedNode],
    layers: Mapping[str, DeployedLayer],
    model: nn.Module,
    run: Callable[[], object],
    target: str,
) -> tuple[LayerCheck, ...]:
    """Feed each layer's part of the file the input that its module has in torch, and compare the outputs.

    Args:
        proto: the file, weights included.
        nodes: the nodes that the writer reports.
        layers: by name.
        model: the torch model whose outputs the file should give; its modules have the layers' names.
        run: calls the model once.
        target: the runtime that the file was written for.

    Returns:
        A check of every layer that is a module and was called once, in the file's order.

    Raises:
        ExportError: names the first layer that differs.
    """
    modules = dict(model.named_modules())
    calls_of = Counter(node.layer for node in nodes)
    once = [node for node in nodes if calls_of[node.layer] == 1]
    chosen = [node for node in once if hasattr(modules.get(node.layer), "weight") and node.norm in ("", *modules)]
    calls = record_calls(model, chosen, layers, run)
    checks = []
    for node in chosen:
        if node.layer in calls:
            checks.append(check := _check(proto, node, layers[node.layer], *calls[node.layer], target))
            if not check.ok:
                raise ExportError(_explained(check))
    return tuple(checks)


def _explained(check: LayerCheck) -> str:
    if not check.is_quantized:
        return f"layer {check.node!r} does not compute the same as torch: relative L2 {check.most_steps:.2g}"
    return (
        f"layer {check.node!r} does not compute the same as torch from the same input: up to {check.most_steps:.3g} "
        f"quantization steps apart (at most {MOST_STEPS:g}), {check.equal:.2%} equal (at least {EQUAL:.1%})"
    )


def _check(
    proto: onnx.ModelProto, node: ExportedNode, layer: DeployedLayer, prepared: Tensor, expected: Tensor, target: str
) -> LayerCheck:
    is_unbatched = expected.dim() < prepared.dim()
    if node.op == "Gemm":
        prepared = prepared.flatten(0, -2)
    part = LayerPart(proto, node.name, layer.layer.has_bias)
    got = onnxruntime_runner(part.model, target)({part.input: prepared.to(part.dtype).numpy()})[0]
    expected = expected.relu() if part.is_rectified else expected
    want = (expected.unsqueeze(0) if is_unbatched else expected).double().numpy()
    result = got.astype(np.float64).reshape(want.shape)
    apart = np.abs(difference(result, want))
    if part.step is None:
        norm = float(np.linalg.norm(finite(want)))
        return LayerCheck(node.name, float(np.linalg.norm(apart)) / (norm or 1.0), 1.0, False, want.size)
    behind = want.ndim - 2 if node.op in CONVS else 0
    by_channel = part.step.reshape(-1, *[1] * behind)
    steps = apart / by_channel
    length = layer.weight.values.numel() / layer.layer.out_features
    others = tuple(dim for dim in range(want.ndim) if dim != layer.layer.channel_dim % want.ndim)
    largest = (np.abs(finite(want)) / by_channel).max(others, keepdims=True, initial=0)
    rounding = np.broadcast_to(ROUNDING * length**0.5 * largest, steps.shape)
    equal = float((steps < np.maximum(HALF, rounding)).mean()) if steps.size else 1.0
    if part.is_pruned:
        is_kept_by_both = (result == 0) == (want == 0)
        steps, rounding = steps[is_kept_by_both], rounding[is_kept_by_both]
    if not steps.size:
        return LayerCheck(node.name, 0.0, equal, True, want.size)
    worst = np.argmax(steps - rounding)
    return LayerCheck(node.name, float(steps.flat[worst]), equal, True, want.size, float(rounding.flat[worst]))
