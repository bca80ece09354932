"""Export of a compiled model to a file: ONNX, or a TensorRT plan built from it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from nmcompile.api.finalize import finalize
from nmcompile.arguments import Args, Kwargs
from nmcompile.backends.tensorrt import EngineReport, build_engine
from nmcompile.checks import check_call, check_compiled, check_kind, check_path
from nmcompile.errors import ConfigError, ExportError, nearest
from nmcompile.export import Example, OnnxReport, Verification, check_options, staged_model, verify_onnx, write_onnx
from nmcompile.export.collect_layers import deployed_layers
from nmcompile.export.deployed_layer import DeployedLayer
from nmcompile.printable import printable, table
from nmcompile.three_gemm.record import record_of

ENGINES = (".engine", ".plan")


@dataclass(frozen=True)
class ExportReport:
    """The written file, its comparison with the model, and for a plan TensorRT's report."""

    onnx: OnnxReport
    layers: Mapping[str, DeployedLayer]
    verification: Verification | None
    engine: EngineReport | None

    def __str__(self) -> str:
        rows = [
            [node.name, node.op, *_deployed(self.layers[node.layer]), "; ".join(node.notes)] for node in self.onnx.nodes
        ]
        nodes = table(
            rows, headers=["layer", "node", "weight", "input", "output", "note"], maxcolwidths=[None] * 5 + [60]
        )
        size = f"{printable(self.onnx.path.name)}: {self.onnx.bytes / 1e6:.2f} MB for {self.onnx.target}"
        parts = [
            nodes,
            size,
            *self.onnx.notes,
            *(str(part) for part in (self.verification, self.engine) if part is not None),
        ]
        return "\n\n".join(parts)


def export(
    compiled: nn.Module,
    path: str | os.PathLike[str],
    args: Args,
    *,
    kwargs: Kwargs | None = None,
    target: str | None = None,
    container: str = "int8",
    precision: str = "fp32",
    dynamic_batch: bool = True,
    dynamic_shapes: object = None,
    verify: bool = True,
) -> ExportReport:
    """Write a compiled model as deployed: zeros and grids in the weights, pruning and Q/DQ before the layers.

    Args:
        compiled: a compiled model, in eval mode, with calibrated inputs.
        path: `.onnx`; or `.engine` or `.plan`, for which the ONNX file is first written beside it. An existing file is
            replaced once the new one is verified, and is unchanged after an error.
        args, kwargs: an example of the inputs, a tuple and a dict. Verification runs on it too, and realistic values
            show more there than zeros.
        target: the runtime of the file, `"onnxruntime"` (default of `.onnx`) or `"tensorrt"`: it decides how inputs
            are quantized.
        container: `"int8"`, or `"int4"` for the smallest file: 2:4 weights of 4 bits take 2⅔ bits each, which runtimes
            make INT8 of when they load the file, and others 4; for TensorRT only where inputs are in floating point.
        precision: `"fp32"`, or `"fp16"` for models whose layers are not quantized; models in float16 stay so.
        dynamic_batch: leave the batch size open.
        dynamic_shapes: the dims to leave open, in the form that `torch.export.export` takes, in place of
            `dynamic_batch`: {"x": {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}}. Arguments that it leaves out
            have fixed shapes. Plans take an open first dim only.
        verify: read the file back, count blocks that break their pattern, and compare ONNX Runtime and the ONNX
            reference with the model, layer by layer and end to end.

    Raises:
        ConfigError: an unknown suffix, target, container or precision; `args` that are not a tuple, or hold no tensor.
        CalibrationError: an input is to be quantized, but has no clip.
        ExportError: a model that cannot be written as asked, or a file that does not compute the same.
        BackendUnavailable: a plan without TensorRT; the ONNX file is written anyway.
    """
    check_compiled("compiled", compiled)
    example = _example(args, kwargs)
    path, onnx_path, target = _chosen(check_path("path", path), target)
    check_options(target, container, precision)
    for name, value in {"dynamic_batch": dynamic_batch, "verify": verify}.items():
        check_kind(name, value, bool, "True or False")
    root, _ = record_of(compiled)
    if compiled.training:
        raise ExportError(f"{type(compiled).__name__} is in train mode; call .eval() before export")
    if compiled is not root:
        raise ExportError(f"{type(compiled).__name__} wraps a compiled model; export that, or compile what wraps it")
    layers = deployed_layers(compiled)
    with staged_model(onnx_path) as staged:
        report = write_onnx(
            finalize(compiled), layers, staged, args,
            kwargs=kwargs, target=target, container=container, precision=precision, dynamic_batch=dynamic_batch,
            dynamic_shapes=dynamic_shapes,
        )  # fmt: skip
        verification = verify_onnx(report, layers, compiled, [example]) if verify else None
    report = replace(report, path=onnx_path)
    engine = build_engine(onnx_path, path) if path.suffix in ENGINES else None
    return ExportReport(report, layers, verification, engine)


def _example(args: Args | None, kwargs: Kwargs | None) -> Example:
    check_call(args, kwargs)
    example = Example(args or (), kwargs or {})
    if not example.tensors:
        raise ConfigError("args and kwargs hold no tensor; give an example of the model's inputs, args=(x,)")
    return example


def _chosen(path: Path, target: str | None) -> tuple[Path, Path, str]:
    """Return the requested file, its ONNX file, and the target."""
    if path.suffix == ".onnx":
        return path, path, "onnxruntime" if target is None else target
    if path.suffix not in ENGINES:
        known = nearest(path.suffix, (".onnx", *ENGINES))
        raise ConfigError(f"path {path.name!r} has the unknown suffix {path.suffix!r}; {known}")
    if target not in (None, "tensorrt"):
        raise ConfigError(f"{path.name} is a TensorRT plan, so its target cannot be {target!r}; leave target out")
    return path, path.with_suffix(".onnx"), "tensorrt"


def _deployed(layer: DeployedLayer) -> tuple[str, str, str]:
    """Describe the weight, and the steps on the input and the output."""
    weight, input, output = (
        " ".join(str(what) for what in (part.pattern, part.grid) if what is not None)
        for part in (layer.weight, layer.input, layer.output)
    )
    return weight or "dense", input or "as it is", output or "as it is"
