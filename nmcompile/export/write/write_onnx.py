"""A plain model and its deployed layers -> one ONNX file."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from nmcompile.arguments import Args, Kwargs
from nmcompile.checks import check_choice
from nmcompile.errors import ExportError
from nmcompile.export.deployed_layer import DeployedLayer
from nmcompile.export.planned_patterns import PLANNED
from nmcompile.export.write.absorb_norms import Affine, absorb_norm
from nmcompile.export.write.add_integers import add_integers
from nmcompile.export.write.bake_weights import bake_weights
from nmcompile.export.write.clean_graph import clean_graph, drop_unused, strip_origin
from nmcompile.export.write.find_layers import LayerNode, find_layers
from nmcompile.export.write.keep_float_biases import is_read_in_floats, keep_bias
from nmcompile.export.write.keep_float_weights import keep_weight
from nmcompile.export.write.lift_weight_rank import lift_weight
from nmcompile.export.write.mask_attention import mask_attention
from nmcompile.export.write.name_values import describe_layers, name_outputs
from nmcompile.export.write.pack_weights import pack_weights
from nmcompile.export.write.quantize_activations import is_emulated, quantize_activations
from nmcompile.export.write.round_integers import round_integers
from nmcompile.export.write.save_model import save_model
from nmcompile.export.write.store_biases import store_bias
from nmcompile.export.write.trace_model import trace_model

TARGETS = ("onnxruntime", "tensorrt")
CONTAINERS = ("int8", "int4")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class ExportedNode:
    """One GEMM of the file.

    Attributes:
        name: the node's name: the layer's name, with "#2" if it is the layer's second call.
        layer: the layer's name.
        op: Conv, ConvTranspose, Gemm or MatMul.
        norm: the module of the absorbed norm; "" if none.
        notes: facts about the node that a user of the target should know.
    """

    name: str
    layer: str
    op: str
    norm: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class OnnxReport:
    """Report of what was written where.

    Attributes:
        notes: parts of the model that are not in the file.
        ranges: the smallest and the largest size of each dim that is left open, by name.
    """

    path: Path
    target: str
    container: str
    precision: str
    bytes: int
    nodes: tuple[ExportedNode, ...]
    notes: tuple[str, ...] = ()
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def write_onnx(
    plain: nn.Module,
    layers: Mapping[str, DeployedLayer],
    path: str | os.PathLike[str],
    args: Args,
    *,
    kwargs: Kwargs | None = None,
    target: str = "onnxruntime",
    container: str = "int8",
    precision: str = "fp32",
    dynamic_batch: bool = True,
    dynamic_shapes: object = None,
) -> OnnxReport:
    """Write a model with its layers as they are deployed.

    Args:
        plain: the model in eval mode; its other parameters are written unchanged.
        layers: by layer name; their weights are written instead of those of `plain`.
        path: path of the file.
        args, kwargs: an example of the inputs.
        target: the runtime, "onnxruntime" or "tensorrt": it decides how inputs are quantized.
        container: "int8", or "int4" for the smallest file, see `pack_weights`.
        precision: "fp32", or "fp16" for models without quantized layers.
        dynamic_batch: leave the batch size open.
        dynamic_shapes: the dims to leave open instead, in torch.export's form.

    Raises:
        ConfigError: an unknown target, container or precision, or `dynamic_shapes` that do not fit the inputs.
        ExportError: a model that cannot be written as asked; the message names the layer or the node.
    """
    check_options(target, container, precision)
    _check_types(layers, target, container, precision)
    traced = trace_model(
        plain, args, kwargs or {},
        dtype=PRECISIONS[precision], dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes,
    )  # fmt: skip
    model, aliases = traced.model, _aliases(plain)
    idle = [name for name, layer in layers.items() if traced.unread.issuperset(aliases.get(layer.weight.name, ("",)))]
    layers = {name: layer for name, layer in layers.items() if name not in idle}
    clean_graph(model, {alias for layer in layers.values() for alias in aliases.get(layer.weight.name, ())})
    mask_attention(model)
    sites = find_layers(model, layers, aliases)
    affines = [absorb_norm(site) for site in sites]
    bake_weights(model, sites, affines)
    quantize_activations(model, sites, target)
    if target == "onnxruntime":
        add_integers(model)
        for site in sites:
            keep_bias(model, site)
            keep_weight(site)
            lift_weight(model, site)
            store_bias(model, site)
        round_integers(model, sites)
    if container == "int4":
        pack_weights(model, sites, target)
    drop_unused(model)
    strip_origin(model)
    name_outputs(model, traced.outputs)
    describe_layers(sites)
    model.producer_name, model.producer_version = "nmcompile", ""
    patterns = {site.name: site.deployed.weight.pattern for site in sites}
    model.metadata_props[PLANNED] = json.dumps({name: str(p) for name, p in patterns.items() if p is not None})
    nodes = tuple(_described(site, affine, target) for site, affine in zip(sites, affines, strict=True))
    notes = _notes(idle, traced.left_out)
    return OnnxReport(Path(path), target, container, precision, save_model(model, path), nodes, notes, traced.ranges)


def _notes(idle: Sequence[str], left_out: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if idle:
        notes.append(f"not in the file, since no output needs them in eval mode with these args: {', '.join(idle)}")
    if left_out:
        notes.append(f"outputs that are not tensors are left out of the file: {', '.join(left_out)}")
    return tuple(notes)


def _aliases(plain: nn.Module) -> dict[str, list[str]]:
    """Return every name of each parameter, by name: tied weights have several."""
    names: dict[int, list[str]] = {}
    parameters = list(plain.named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        names.setdefault(id(parameter), []).append(name)
    return {name: names[id(parameter)] for name, parameter in parameters}


def check_options(target: str, container: str, precision: str) -> None:
    """Raise for an unknown target, container or precision."""
    check_choice("target", target, TARGETS)
    check_choice("container", container, CONTAINERS)
    check_choice("precision", precision, PRECISIONS)


def _check_types(layers: Mapping[str, DeployedLayer], target: str, container: str, precision: str) -> None:
    for name, layer in layers.items():
        is_quantized = any(part.grid is not None for part in (layer.weight, layer.input, layer.output))
        _check_dtype(name, layer.weight.values.dtype, is_quantized)
        if precision == "fp16" and is_quantized:
            raise ExportError(f"layer {name!r} is quantized, and an fp16 graph holds no quantized layers; use fp32")
        is_int4 = container == "int4" and layer.weight.grid is not None and layer.weight.grid.bits <= 4
        if target == "tensorrt" and is_int4 and layer.input.grid is not None:
            raise ExportError(
                f"layer {name!r}: TensorRT takes INT4 weights only where the input is not quantized (weight-only); "
                f"use container='int8', or leave the inputs in floating point"
            )


def _check_dtype(name: str, dtype: torch.dtype, is_quantized: bool) -> None:
    if dtype == torch.bfloat16 or (dtype == torch.float16 and is_quantized):
        what = "quantized layers are written from float32" if is_quantized else "runtimes have no such kernels on CPUs"
        raise ExportError(
            f"layer {name!r} has a {str(dtype).removeprefix('torch.')} weight, and {what}; call model.float() before "
            "compile, and give float32 inputs"
        )


def _described(site: LayerNode, affine: Affine | None, target: str) -> ExportedNode:
    notes = []
    if affine is not None and site.deployed.weight.grid is not None and (affine.gain < 0).any():
        notes.append("channels with a negative gamma hold flipped integers")
    for operand, grid in (("input", site.deployed.input.grid), ("output", site.deployed.output.grid)):
        if grid is not None and is_emulated(grid, target):
            notes.append(f"{operand} rounded in floats: TensorRT's INT8 ends at 127, the grid at {grid.high}")
    is_integer = site.deployed.weight.grid is not None and site.deployed.input.grid is not None
    if is_integer and is_read_in_floats(site.node.outputs[0]):
        notes.append(
            "its result is read in floating point; integer kernels need args= and CompileConfig(outputs='int8')"
        )
    norm = "" if affine is None else affine.module
    return ExportedNode(site.name, site.deployed.layer.name, site.node.op_type, norm, tuple(notes))
