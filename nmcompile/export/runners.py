"""Runtimes that execute an exported model on the CPU."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

Arrays = list[np.ndarray[Any, Any]]
Runner = Callable[[Mapping[str, np.ndarray[Any, Any]]], Arrays]
"""From inputs by name to all outputs."""


def onnxruntime_runner(proto: onnx.ModelProto | str, target: str) -> Runner:
    """Runs a model in ONNX Runtime: as users run it if it was written for ONNX Runtime, else as it says.

    What ONNX Runtime makes of files for others is not always what they say: it rounds biases, for one.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if target != "onnxruntime":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = proto if isinstance(proto, str) else proto.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return lambda feeds: list(session.run(None, dict(feeds)))


def reference_runner(proto: onnx.ModelProto) -> Runner:
    """Runs a model in ONNX's own evaluator."""
    evaluator = ReferenceEvaluator(proto)
    return lambda feeds: list(evaluator.run(None, dict(feeds)))
