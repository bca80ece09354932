"""Does each layer of an exported file compute what it computes in torch, given the same input?"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor, nn

from nmcompile.errors import ExportError
from nmcompile.export.compare_runtimes import RELATIVE_L2, onnxruntime_runner
from nmcompile.export.write_onnx import ExportedNode
from nmcompile.ir.deployed import DeployedLayer

MOST_STEPS = 1.0
DIGITS = 1e-4  # how exactly float32 tells results of some hundred steps apart
EQUAL = 0.999
INPUT_SIDE = frozenset({"prune", "quantize", "clip", "dequantize", "divide", "round", "multiply"})
OUTPUT_SIDE = frozenset(f"output_{step}" for step in INPUT_SIDE)
STEPPED = frozenset({"DequantizeLinear", "Mul"})  # their second input is a scale


@dataclass(frozen=True)
class LayerCheck:
    """One node against its module.

    Attributes:
        node: its name.
        most_steps: the largest difference in steps, for layers in floating point the relative L2 difference. A step is
            the accumulator's, input scale times weight scale, or that of an output which is quantized. Where an output
            is pruned, what only one side keeps (a tie but for rounding) is no difference in steps.
        equal: the fraction of outputs less than half a step apart.
        outputs: how many there are. Of fewer than 1000, one may differ: a value next to the middle of two steps.
    """

    node: str
    most_steps: float
    equal: float
    is_quantized: bool
    outputs: int

    @property
    def ok(self) -> bool:
        if not self.is_quantized:
            return self.most_steps <= RELATIVE_L2
        may_differ = max(1.0, (1 - EQUAL) * self.outputs)
        return self.most_steps <= MOST_STEPS + DIGITS and (1 - self.equal) * self.outputs <= may_differ + DIGITS


def check_layers(
    proto: onnx.ModelProto,
    nodes: Sequence[ExportedNode],
    layers: Mapping[str, DeployedLayer],
    model: nn.Module,
    run: Callable[[], Any],
    target: str,
) -> tuple[LayerCheck, ...]:
    """Feed each layer's part of the file the input that its module has in torch.

    Args:
        proto: the file, weights included.
        nodes: what the writer says that it wrote.
        layers: by name.
        model: computes in torch what the file should; its modules have the layers' names.
        run: calls the model once.
        target: what the file was written for.

    Returns:
        A check of every layer that is a module and was called once, in the file's order.

    Raises:
        ExportError: names the first layer that differs.
    """
    modules = dict(model.named_modules())
    calls_of = Counter(node.layer for node in nodes)
    once = [node for node in nodes if calls_of[node.layer] == 1]
    chosen = [node for node in once if hasattr(modules.get(node.layer), "weight") and node.norm in ("", *modules)]
    calls = _record(modules, chosen, run)
    checks = []
    for node in chosen:
        if node.layer in calls:
            checks.append(check := _check(proto, node, layers[node.layer], *calls[node.layer], target))
            if not check.ok:
                raise ExportError(_explained(check))
    return tuple(checks)


def _explained(check: LayerCheck) -> str:
    if not check.is_quantized:
        return f"layer {check.node!r} computes something else than torch: relative L2 {check.most_steps:.2g}"
    return (
        f"layer {check.node!r} computes something else than torch from the same input: up to {check.most_steps:.3g} "
        f"quantization steps apart (at most {MOST_STEPS:g}), {check.equal:.2%} equal (at least {EQUAL:.1%})"
    )


def _record(
    modules: Mapping[str, nn.Module], nodes: Sequence[ExportedNode], run: Callable[[], Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The input of each layer and the output of what the file computes in its place, the norm included."""
    inputs: dict[str, list[Tensor]] = {node.layer: [] for node in nodes}
    outputs: dict[str, list[Tensor]] = {node.layer: [] for node in nodes}
    hooks = []
    for node in nodes:

        def before(module: nn.Module, args: tuple[Any, ...], seen: list[Tensor] = inputs[node.layer]) -> None:
            seen.append(args[0].detach().clone())

        def after(
            module: nn.Module, args: tuple[Any, ...], out: Tensor, seen: list[Tensor] = outputs[node.layer]
        ) -> None:
            seen.append(out.detach().clone())

        # The first of all hooks: others may prune and quantize what the module is given.
        hooks.append(modules[node.layer].register_forward_pre_hook(before, prepend=True))
        hooks.append(modules[node.norm or node.layer].register_forward_hook(after))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    once = [n.layer for n in nodes if len(inputs[n.layer]) == len(outputs[n.layer]) == 1]
    return {layer: (inputs[layer][0], outputs[layer][0]) for layer in once}


def _check(
    proto: onnx.ModelProto, node: ExportedNode, layer: DeployedLayer, x: Tensor, expected: Tensor, target: str
) -> LayerCheck:
    prepared, unbatched = layer.layer.prepare(x)
    if node.op == "Gemm":
        prepared = prepared.flatten(0, -2)
    part = _Part(proto, node.name)
    got = onnxruntime_runner(part.model, target)({part.input: prepared.to(part.dtype).numpy()})[0]
    want = (expected.unsqueeze(0) if unbatched else expected).double().numpy()
    result = got.astype(np.float64).reshape(want.shape)
    difference = np.abs(result - want)
    if part.step is None:
        norm = float(np.linalg.norm(want))
        return LayerCheck(node.name, float(np.linalg.norm(difference)) / (norm or 1.0), 1.0, False, want.size)
    behind = want.ndim - 2 if node.op == "Conv" else 0
    steps = difference / part.step.reshape(-1, *[1] * behind)
    equal = float((steps < 0.5).mean()) if steps.size else 1.0
    if part.is_pruned:
        steps = steps[(result == 0) == (want == 0)]
    return LayerCheck(node.name, float(steps.max(initial=0)), equal, True, want.size)


def _kind(node: NodeProto) -> str:
    """What a node of the writer's does: the end of its name."""
    return node.name.rpartition(".")[2]


class _Part:
    """The part of a file that belongs to one layer, as a model of its own.

    Attributes:
        model: from the layer's input, before pruning and quantization, to its output with the bias, and with what
            prunes and quantizes it behind its ReLU.
        input: its name.
        step: of the accumulator, a number or one for each out-channel, or of the quantized output; None if neither is
            quantized.
        is_pruned: whether the output is.
    """

    def __init__(self, proto: onnx.ModelProto, name: str) -> None:
        graph = proto.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {output: node for node in graph.node for output in node.output}
        gemm = next(node for node in graph.node if node.name == name)
        front = self._front(gemm.input[0])
        self.input = front[-1].input[0] if front else gemm.input[0]
        weight = self._sources(gemm.input[1])
        behind = self._behind(graph.node, gemm)
        nodes = [*reversed(front), *weight, gemm, *behind]
        self.is_pruned = any(_kind(node) == "output_prune" for node in behind)
        last = behind[-1] if behind else gemm
        is_quantized_behind = _kind(last) in OUTPUT_SIDE and last.op_type in STEPPED
        self.step = self._scale(last) if is_quantized_behind else self._step(gemm)
        self.dtype, kind = self._dtype(gemm)
        used = {source for node in nodes for source in node.input}
        body = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info(self.input, kind, None)],
            [helper.make_tensor_value_info(last.output[0], kind, None)],
            [tensor for tensor in graph.initializer if tensor.name in used],
        )
        self.model = helper.make_model(
            body, opset_imports=proto.opset_import, functions=proto.functions, ir_version=proto.ir_version
        )

    def _front(self, name: str) -> list[NodeProto]:
        """What prunes and quantizes an input, nearest to the GEMM first; the writer names it after a layer."""
        front = []
        node = self.producers.get(name)
        while node is not None and _kind(node) in INPUT_SIDE:
            front.append(node)
            node = self.producers.get(node.input[0])
        return front

    def _sources(self, name: str) -> list[NodeProto]:
        node = self.producers.get(name)
        return [] if node is None else [*(n for source in node.input for n in self._sources(source)), node]

    def _behind(self, nodes: Sequence[NodeProto], gemm: NodeProto) -> list[NodeProto]:
        """The bias, if it is a node of its own, then the ReLU and what prunes and quantizes its result."""
        behind: list[NodeProto] = []
        users = [node for node in nodes if gemm.output[0] in node.input]
        if len(users) == 1 and users[0].op_type == "Add" and any(n in self.constants for n in users[0].input):
            behind = users
            users = [node for node in nodes if users[0].output[0] in node.input]
        rest: list[NodeProto] = []
        while len(users) == 1 and (_kind(users[0]) in OUTPUT_SIDE or (not rest and users[0].op_type == "Relu")):
            rest += users
            users = [node for node in nodes if rest[-1].output[0] in node.input]
        return behind + (rest if len(rest) > 1 else [])

    def _step(self, gemm: NodeProto) -> npt.NDArray[np.float64] | None:
        input, weight = (self._scale(self.producers.get(operand)) for operand in gemm.input[:2])
        return None if input is None or weight is None else input * weight

    def _scale(self, node: NodeProto | None) -> npt.NDArray[np.float64] | None:
        scale = None if node is None or node.op_type not in STEPPED else self.constants.get(node.input[1])
        return None if scale is None else numpy_helper.to_array(scale).astype(np.float64)

    def _dtype(self, gemm: NodeProto) -> tuple[torch.dtype, int]:
        tensor = self.constants.get(gemm.input[1])
        is_half = tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT16
        return (torch.float16, onnx.TensorProto.FLOAT16) if is_half else (torch.float32, onnx.TensorProto.FLOAT)
