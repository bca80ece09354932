"""Extraction of the part of an exported file that belongs to one layer."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import NodeProto, helper, numpy_helper

INPUT_SIDE = frozenset({"prune", "quantize", "clip", "dequantize", "divide", "round", "multiply"})
OUTPUT_SIDE = frozenset(f"output_{step}" for step in INPUT_SIDE)
STEPPED = frozenset({"DequantizeLinear", "Mul"})  # their second input is a scale


def _kind(node: NodeProto) -> str:
    """Return the step that one of the writer's nodes performs: the end of its name."""
    return node.name.rpartition(".")[2]


class LayerPart:
    """The part of a file that belongs to one layer, as a model of its own.

    Attributes:
        model: the part from the layer's input, before pruning and quantization, to its output with the bias, and with
            the nodes that prune and quantize it after its ReLU.
        input: name of the input.
        step: the step of the accumulator, a number or one for each out-channel, or of the quantized output; None if
            neither is quantized.
        is_pruned: whether the output is pruned.
        is_rectified: whether a ReLU is part of it.
        dtype: dtype of its floats.
        integers: the tensor that quantizes its input, before the DequantizeLinear; `""` if there is none.
        input_scale, input_zero: scale and zero point of that tensor.
        input_model, unpruned_model: from the layer's input to the dequantized input; the second does not prune.
    """

    def __init__(self, proto: onnx.ModelProto, name: str, has_bias: bool) -> None:
        graph, self.has_bias = proto.graph, has_bias
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {output: node for node in graph.node for output in node.output}
        gemm = next(node for node in graph.node if node.name == name)
        front = self._front(gemm.input[0])
        self.input = front[-1].input[0] if front else gemm.input[0]
        weight = [node for operand in gemm.input[1:] for node in self._sources(operand)]
        behind = self._behind(graph.node, gemm)
        nodes = [*reversed(front), *weight, gemm, *behind]
        self.is_pruned = any(_kind(node) == "output_prune" for node in behind)
        self.is_rectified = any(node.op_type == "Relu" for node in behind)
        last = behind[-1] if behind else gemm
        is_quantized_behind = _kind(last) in OUTPUT_SIDE and last.op_type in STEPPED
        self.step = self._scale(last) if is_quantized_behind else self._step(gemm)
        self.dtype, kind = self._dtype(gemm)
        self.model = self._model(proto, nodes, kind)
        self.integers = front[0].input[0] if front and front[0].op_type == "DequantizeLinear" else ""
        if self.integers:
            self.input_scale, self.input_zero = (self._constant(name) for name in front[0].input[1:])
            self.input_model = self._model(proto, front[::-1], kind)
            self.unpruned_model = self._model(proto, self._unpruned(front[::-1]), kind)

    def _model(self, proto: onnx.ModelProto, nodes: Sequence[NodeProto], kind: int) -> onnx.ModelProto:
        used = {source for node in nodes for source in node.input}
        body = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info(self.input, kind, None)],
            [helper.make_tensor_value_info(nodes[-1].output[0], kind, None)],
            [tensor for tensor in proto.graph.initializer if tensor.name in used],
        )
        return helper.make_model(
            body, opset_imports=proto.opset_import, functions=proto.functions, ir_version=proto.ir_version
        )

    def _unpruned(self, front: Sequence[NodeProto]) -> list[NodeProto]:
        """Return copies of the nodes, a chain from the input on, without those that prune."""
        nodes, before = [], self.input
        for node in front:
            if _kind(node) != "prune":
                nodes.append(copy := NodeProto())
                copy.CopyFrom(node)
                copy.input[0], before = before, node.output[0]
        return nodes

    def _front(self, name: str) -> list[NodeProto]:
        """Return the nodes that prune and quantize an input, nearest to the GEMM first, found by their names."""
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
        """Return the nodes after the GEMM: a bias or Sum node, then the ReLU and what prunes and quantizes it."""
        behind: list[NodeProto] = []
        users = [node for node in nodes if gemm.output[0] in node.input]
        if len(users) == 1 and self._belongs(users[0], gemm):
            behind = users
            users = [node for node in nodes if users[0].output[0] in node.input]
        rest: list[NodeProto] = []
        while len(users) == 1 and (_kind(users[0]) in OUTPUT_SIDE or (not rest and users[0].op_type == "Relu")):
            rest += users
            users = [node for node in nodes if rest[-1].output[0] in node.input]
        return behind + (rest if len(rest) > 1 else [])

    def _belongs(self, node: NodeProto, gemm: NodeProto) -> bool:
        """Return whether a node adds the layer's bias or is its Sum; the model may add a parameter of its own."""
        is_apart = node.name == f"{gemm.name}.add" or (self.has_bias and len(gemm.input) < 3)
        adds_bias = is_apart and node.op_type == "Add" and any(name in self.constants for name in node.input)
        return adds_bias or (node.op_type == "Sum" and len(node.input) == 1)

    def _step(self, gemm: NodeProto) -> npt.NDArray[np.float64] | None:
        input, weight = (self._scale(self.producers.get(operand)) for operand in gemm.input[:2])
        return None if input is None or weight is None else input * weight

    def _scale(self, node: NodeProto | None) -> npt.NDArray[np.float64] | None:
        is_constant = node is not None and node.op_type in STEPPED and node.input[1] in self.constants
        return self._constant(node.input[1]).astype(np.float64) if node is not None and is_constant else None

    def _constant(self, name: str) -> npt.NDArray[np.generic]:
        return numpy_helper.to_array(self.constants[name])

    def _dtype(self, gemm: NodeProto) -> tuple[torch.dtype, int]:
        tensor = self.constants.get(gemm.input[1])
        is_half = tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT16
        return (torch.float16, onnx.TensorProto.FLOAT16) if is_half else (torch.float32, onnx.TensorProto.FLOAT)
