"""Exported files in TensorRT's parser and builder and in Polygraphy, where they are installed."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import Tensor, nn

from nmcompile.export import write_onnx

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "int8": ({"prune_inputs": True}, {}),
    "int8-per-channel": ({"per_channel": True}, {}),
    "int4": ({"input_bits": None}, {"container": "int4"}),
    "fp32": ({"weight_bits": None, "input_bits": None}, {}),
    "fp16": ({"weight_bits": None, "input_bits": None}, {"precision": "fp16"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensorrt_builds_a_plan(
    net: nn.Module, images: Tensor, deploy: Callable[..., Any], tmp_path: Path, variant: str
) -> None:
    trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    how, options = VARIANTS[variant]
    model = deploy(net, **how)
    report = write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (images,), target="tensorrt", **options)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(report.path.read_bytes()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, (1, 8, 6, 6), (4, 8, 6, 6), (8, 8, 6, 6))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize("variant", ["int8", "fp32", "fp16"])
def test_polygraphy_finds_every_planned_tensor_sparse(
    net: nn.Module, images: Tensor, deploy: Callable[..., Any], tmp_path: Path, variant: str
) -> None:
    """Polygraphy looks at floats only, so the integers are shown to it as floats."""
    pytest.importorskip("onnx_graphsurgeon", reason="onnx-graphsurgeon is not installed")
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed")
    how, options = VARIANTS[variant]
    model = deploy(net, **how)
    report = write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (images,), target="tensorrt", **options)
    proto = onnx.load(report.path)
    for tensor in proto.graph.initializer:
        if tensor.name.endswith("weight_quantized"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    onnx.save(proto, report.path)
    program = "from polygraphy.tools import main; main()"
    command = [sys.executable, "-c", program, "inspect", "sparsity", str(report.path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert sorted(re.findall(r"Found sparse tensor: ([\w.]+?)\.weight", said)) == sorted(model.layers)
