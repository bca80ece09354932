"""Does an exported file compute what the torch model computes? End to end, in several runtimes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor
from torch.utils import _pytree as pytree

from nmcompile.errors import ExportError
from nmcompile.onnx_files import OnnxFile

RELATIVE_L2 = 1e-2
SAME_TOP1 = 0.99
Feeds = Mapping[str, np.ndarray[Any, Any]]
Runner = Callable[[Feeds], list[np.ndarray[Any, Any]]]


@dataclass(frozen=True)
class RuntimeCheck:
    """A runtime against torch.

    Attributes:
        runtime: its name.
        relative_l2: |difference| / |torch| over all outputs and batches.
        same_top1: the fraction of samples with the same largest class; 1 where no output has shape (batch, classes).
    """

    runtime: str
    relative_l2: float
    same_top1: float

    @property
    def ok(self) -> bool:
        return self.relative_l2 <= RELATIVE_L2 and self.same_top1 >= SAME_TOP1  # a NaN is not


def onnxruntime_runner(proto: onnx.ModelProto | str, target: str) -> Runner:
    """Runs a model in ONNX Runtime on the CPU: as users run it if it was written for ONNX Runtime, else as it says.

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


def compare_runtime(
    name: str,
    run: Runner,
    inputs: Mapping[str, np.dtype[Any]],
    reference: Callable[..., Any],
    batches: Iterable[tuple[Any, ...]],
) -> RuntimeCheck:
    """Run both on the same batches.

    Args:
        name: of the runtime.
        run: the exported model.
        inputs: the dtypes of its inputs by name, in the order of forward's tensors.
        reference: the torch model.
        batches: arguments for it.
    """
    squares, total, same, samples = 0.0, 0.0, 0, 0
    for args in batches:
        tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
        with torch.no_grad():
            expected = [x.double().numpy() for x in pytree.tree_leaves(reference(*args)) if isinstance(x, Tensor)]
        feeds = zip(inputs.items(), tensors, strict=True)
        found = run({key: x.detach().numpy().astype(dtype) for (key, dtype), x in feeds})
        for want, got in zip(expected, found, strict=True):
            squares += float(np.square(got.astype(np.float64) - want).sum())
            total += float(np.square(want).sum())
            if want.ndim == 2:
                same += int((got.argmax(1) == want.argmax(1)).sum())
                samples += len(want)
    return RuntimeCheck(name, (squares / total) ** 0.5 if total else squares**0.5, same / samples if samples else 1.0)


def check_runtimes(
    file: OnnxFile, target: str, reference: Callable[..., Any], batches: Iterable[tuple[Any, ...]]
) -> tuple[RuntimeCheck, ...]:
    """ONNX Runtime on all batches, and ONNX's own evaluator, which is slow, on one sample.

    Raises:
        ExportError: a runtime computes something else.
    """
    kept = list(batches)
    types = ((value.name, value.type.tensor_type.elem_type) for value in file.proto.graph.input)
    inputs = {name: onnx.helper.tensor_dtype_to_np_dtype(kind) for name, kind in types}
    runner = onnxruntime_runner(file.proto if file.path is None else str(file.path), target)
    checks = [compare_runtime("ONNX Runtime", runner, inputs, reference, kept)]
    if file.path is None:
        one = pytree.tree_map_only(Tensor, lambda x: x[:1] if _has_open_batch(file) else x, kept[0])
        checks.append(compare_runtime("onnx.reference", reference_runner(file.proto), inputs, reference, [one]))
    for check in checks:
        if not check.ok:
            raise ExportError(
                f"{check.runtime} computes something else than torch: relative L2 {check.relative_l2:.2g} (at most "
                f"{RELATIVE_L2:g}), the same top-1 on {check.same_top1:.1%} (at least {SAME_TOP1:.0%})"
            )
    return tuple(checks)


def _has_open_batch(file: OnnxFile) -> bool:
    dims = file.proto.graph.input[0].type.tensor_type.shape.dim
    return bool(dims) and dims[0].HasField("dim_param")
