"""2:4 weights in pairs: the same numbers, the same graph in ONNX Runtime, a third of the bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile.export import write_onnx
from nmcompile.files.open_onnx import open_onnx
from nmcompile.files.packed_pairs import OPERATOR
from nmcompile.files.read_weights import PACKED, read_weights
from nmcompile.pruning import NMPattern
from tests.optimized_graphs import optimized

Deploy = Callable[..., Any]


class Sequences(nn.Module):
    """A convolution in groups, tokens, and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 12, 3, groups=2)
        self.token, self.head = nn.Linear(12, 8), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.token(self.conv(x).relu().transpose(1, 2)).relu()
        return self.head(tokens.mean(1))


def outputs(path: Path, x: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, {session.get_inputs()[0].name: x.numpy()}))


def types(path: Path) -> list[str]:
    return [weight.dtype for weight in read_weights(open_onnx(path))]


@pytest.mark.parametrize(
    ("kind", "how"),
    [("images", {}), ("images", {"input_bits": None}), ("sequences", {"per_channel": True})],
    ids=["images", "weight-only", "sequences"],
)
def test_a_runtime_has_what_it_has_of_int8_weights(
    net: nn.Module, images: Tensor, deploy: Deploy, tmp_path: Path, kind: str, how: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model, x = (deploy(net, **how), images) if kind == "images" else (deploy(Sequences(), **how), torch.randn(2, 8, 9))
    reports = {
        container: write_onnx(model.plain, model.layers, tmp_path / f"{container}.onnx", (x,), container=container)
        for container in ("int8", "int4")
    }
    packed, plain = reports["int4"].path, reports["int8"].path
    onnx.checker.check_model(str(packed), full_check=True)
    assert types(packed) == [PACKED] * len(model.layers)
    assert optimized(packed) == optimized(plain)
    assert all(map(np.array_equal, outputs(packed, x), outputs(plain, x)))
    for ours, theirs in zip(*(read_weights(open_onnx(path)) for path in (packed, plain)), strict=True):
        assert np.array_equal(ours.rows, theirs.rows)
        assert (ours.node, ours.precision, ours.groups) == (theirs.node, theirs.precision, theirs.groups)


def test_layers_of_one_weight_share_its_pairs(deploy: Deploy, tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            first: Tensor = self.layer(x).relu()
            return self.layer(first)

    model = deploy(Twice())
    path = write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (torch.randn(3, 8),), container="int4").path
    assert [node.op_type for node in onnx.load(path).graph.node].count(OPERATOR) == 1
    assert types(path) == [PACKED] * 2


@pytest.mark.parametrize(
    ("pattern", "target", "how", "expected"),
    [
        (NMPattern(1, 4), "onnxruntime", {}, PACKED),
        (NMPattern(2, 4), "onnxruntime", {"weight_bits": 3}, PACKED),
        (NMPattern(2, 4), "onnxruntime", {"weight_bits": 8}, "INT8"),
        (NMPattern(4, 8), "onnxruntime", {}, "INT4"),
        (None, "onnxruntime", {}, "INT4"),
        (NMPattern(2, 4), "tensorrt", {"input_bits": None}, "INT4"),
    ],
)
def test_what_is_packed_how(
    deploy: Deploy, tmp_path: Path, pattern: NMPattern | None, target: str, how: dict[str, Any], expected: str
) -> None:
    torch.manual_seed(0)
    model = deploy(nn.Linear(64, 64), pattern=pattern, **how)
    x = torch.randn(3, 64)
    options: dict[str, Any] = {"target": target, "container": "int4"}
    path = write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (x,), **options).path
    assert types(path) == [expected]


def test_a_third_of_a_byte_a_weight(deploy: Deploy, tmp_path: Path) -> None:
    """Files of both containers differ by the weights, the tables of the function (9 kB) and the nodes."""
    model, x = deploy(nn.Sequential(*[nn.Linear(256, 256) for _ in range(3)])), torch.randn(2, 256)
    size = {
        container: write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (x,), container=container).bytes
        for container in ("int8", "int4")
    }
    weights = 3 * 256**2
    assert size["int4"] - (size["int8"] - weights) < weights / 3 + 12_000


def test_a_compiled_model_is_verified_and_read_in_pairs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8))
    x = torch.randn(2, 8, 6, 6)
    config = nmcompile.CompileConfig(ends="sparse", outputs="int8")
    compiled = nmcompile.compile(net, "inference", args=(x,), config=config, calibration=[x]).eval()
    report = nmcompile.export(compiled, tmp_path / "m.onnx", (x,), container="int4")
    assert types(report.onnx.path) == [PACKED] * 3
    checked = nmcompile.verify(report.onnx.path)
    assert len(checked.checks) == 3 and checked.ok
