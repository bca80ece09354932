"""Runtimes that execute an exported model on the CPU."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

from nmcompile.errors import ExportError, LibraryError
from nmcompile.export.check.array_difference import Array
from nmcompile.printable import first_line

Arrays = list[Array]
Runner = Callable[[Mapping[str, Array]], Arrays]
"""A function from inputs by name to all outputs."""


def onnxruntime_runner(proto: onnx.ModelProto | str, target: str) -> Runner:
    """Load a model in ONNX Runtime: with its optimizations if it was written for ONNX Runtime, else without.

    The optimizations may change the results of files for other runtimes: they round biases, for one.

    Raises:
        ExportError: ONNX Runtime refuses the file, here or when it runs.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if target != "onnxruntime":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = proto if isinstance(proto, str) else proto.SerializeToString()

    def run(feeds: Mapping[str, Array]) -> Arrays:
        try:
            return list(session.run(None, dict(feeds)))
        except Exception as error:  # ONNX Runtime's exceptions have no common class
            raise ExportError(f"ONNX Runtime cannot run the file: {first_line(error)}") from error

    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot load the file: {first_line(error)}") from error
    return run


def reference_runner(proto: onnx.ModelProto | str) -> Runner:
    """Load a model in ONNX's own evaluator.

    Raises:
        LibraryError: the evaluator fails, here or when it runs. It implements some operators in part only.
    """

    def run(feeds: Mapping[str, Array]) -> Arrays:
        try:
            with np.errstate(all="ignore"):
                return list(evaluator.run(None, dict(feeds)))
        except Exception as error:  # anything that NumPy and the evaluator raise
            raise LibraryError(f"{type(error).__name__}: {first_line(error)}") from error

    try:
        evaluator = ReferenceEvaluator(proto)
    except Exception as error:
        raise LibraryError(f"{type(error).__name__}: {first_line(error)}") from error
    return run
