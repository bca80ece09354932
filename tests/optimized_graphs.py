"""The operators that ONNX Runtime makes of a file."""

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime


def optimized(path: Path) -> Counter[str]:
    """Return how many nodes of each operator are left after all optimizations; those of layouts depend on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = f"{path}.optimized"
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
