"""The operators that ONNX Runtime makes of a file, and files that only prune integers."""

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
from torch import Tensor

from nmcompile.export.write.prune_integers import prune_integers
from nmcompile.export.write.trace_model import OPSET
from nmcompile.onnxruntime import register
from nmcompile.pruning import NMPattern


def optimized(path: Path, native: bool = False) -> Counter[str]:
    """Return how many nodes of each operator are left after all optimizations; those of layouts depend on the CPU.

    Args:
        path: the file.
        native: with the native operators.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = f"{path}.optimized"
    if native:
        register(options)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def integer_model(x: Tensor, high: int, pattern: str, layout: str, dynamic: bool = False) -> onnx.ModelProto:
    """Make a model that only prunes integers like `x`, of any batch if `dynamic`."""
    sizes = ["batch" if dynamic else len(x), *x.shape[1:]]
    value = ir.Value(name="x", shape=ir.Shape(sizes), type=ir.TensorType(ir.DataType.UINT8))
    node = ir.Node("", "Identity", [value])
    graph = ir.Graph([value], [], nodes=[node], opset_imports={"": OPSET}, name="pruning")
    model = ir.Model(graph, ir_version=10)
    graph.outputs.append(prune_integers(model, node, value, high, NMPattern.parse(pattern), layout, "pruned"))
    graph.remove(node, safe=True)
    return ir.to_proto(model)
