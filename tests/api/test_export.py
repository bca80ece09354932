"""`nmcompile.export`: the models it refuses, the files it writes, and what the command line makes of them."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig
from nmcompile.api import export as exporting
from nmcompile.backends.onnxruntime import OnnxRuntimeModel
from nmcompile.backends.tensorrt import tensorrt_support
from nmcompile.errors import BackendUnavailable, CalibrationError, ConfigError, ExportError, FileError
from nmcompile.export import OnnxReport
from nmcompile.export.collect_layers import deployed_layers
from nmcompile.export.deployed_layer import DeployedLayer
from nmcompile.files.open_onnx import open_onnx

X = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Flatten(), nn.Linear(64, 4),
    ).eval()  # fmt: skip


@pytest.fixture
def quantized(net: nn.Module) -> nn.Module:
    return nmcompile.compile(net, "inference", args=(X,), calibration=[X]).eval()


@torch.no_grad()
def test_the_file_computes_what_the_model_does_at_any_batch(quantized: nn.Module, tmp_path: Path) -> None:
    report = nmcompile.export(quantized, tmp_path / "m.onnx", (X,))
    run = OnnxRuntimeModel(tmp_path / "m.onnx")
    for batch in (X, X[:1], torch.cat([X, X + 1])):
        torch.testing.assert_close(run(batch), quantized(batch), rtol=1e-4, atol=1e-4)
    assert report.verification is not None and all(check.ok for check in report.verification.runtimes)
    assert "2:4 s4" in str(report) and "4:8 u4" in str(report) and "same top-1 100.0%" in str(report)


@pytest.mark.parametrize("verify", [True, False])
def test_a_good_file_is_replaced_after_the_new_one_is_verified(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def refuse(report: OnnxReport, *_: object) -> None:
        assert open_onnx(report.path).proto.graph.node and path.read_bytes() == b"old"
        raise ExportError("computes something else")

    monkeypatch.setattr(exporting, "verify_onnx", refuse)
    compiled = nmcompile.compile(net, "weights", args=(X,)).eval()
    if verify:
        with pytest.raises(ExportError, match="computes something else"):
            nmcompile.export(compiled, path, (X,))
        assert path.read_bytes() == b"old"
    else:
        assert nmcompile.export(compiled, path, (X,), verify=False).onnx.path == path
        assert open_onnx(path).proto.graph.node
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("mode", ["weights", "t-weights", "training", "activations", "dense"])
def test_every_mode_is_exported_in_full_precision(net: nn.Module, mode: str, tmp_path: Path) -> None:
    compiled = nmcompile.compile(net, mode, args=(X,)).eval()
    with torch.no_grad():
        expected = compiled(X)
    nmcompile.export(compiled, tmp_path / "m.onnx", (X,))
    torch.testing.assert_close(OnnxRuntimeModel(tmp_path / "m.onnx")(X), expected, rtol=1e-4, atol=1e-4)


def test_stored_integers_are_sparse_and_small(quantized: nn.Module, tmp_path: Path) -> None:
    """Read with onnx alone: INT8 in [-7, 7], at most two of every four along in-channels."""
    nmcompile.export(quantized, tmp_path / "m.onnx", (X,))
    stored = [numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer]
    (weight,) = [array for array in stored if array.shape == (16, 16, 3, 3)]
    assert weight.dtype == np.int8 and np.abs(weight).max() <= 7
    assert (weight != 0).reshape(16, 4, 4, 3, 3).sum(2).max() <= 2


def test_verify_and_inspect_read_files(quantized: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    nmcompile.export(quantized, path, (X,))
    report = nmcompile.verify(path)
    assert report.ok and [check.name for check in report.checks] == ["3"] and report.checks[0].blocks == 576
    everything = nmcompile.verify(path, "2:4")
    assert {check.name: check.violations > 0 for check in everything.checks} == {"0": True, "3": False, "7": True}


def test_a_file_whose_zeros_were_lost_is_found(quantized: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    nmcompile.export(quantized, path, (X,))
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tuple(tensor.dims) == (16, 16, 3, 3):
            tensor.CopyFrom(numpy_helper.from_array(np.ones((16, 16, 3, 3), np.int8), tensor.name))
    onnx.save(model, path)
    assert [check.violations for check in nmcompile.verify(path).checks] == [576]


def test_files_of_others_need_a_pattern(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    torch.onnx.export(net, (X,), path, dynamo=True, verbose=False)
    with pytest.raises(ConfigError, match="give the pattern"):
        nmcompile.verify(path)
    assert not nmcompile.verify(path, "2:4").ok
    (tmp_path / "broken.onnx").write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileError, match=r"broken\.onnx"):
        nmcompile.verify(tmp_path / "broken.onnx", "2:4")


def test_what_wraps_a_compiled_model_is_refused(quantized: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Sequential wraps a compiled model"):
        nmcompile.export(nn.Sequential(quantized).eval(), tmp_path / "m.onnx", args=(X,))


def test_a_model_in_train_mode_is_refused(quantized: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"train mode.*\.eval\(\)"):
        nmcompile.export(quantized.train(), tmp_path / "m.onnx", (X,))


def test_an_uncalibrated_model_is_refused(net: nn.Module, tmp_path: Path) -> None:
    compiled = nmcompile.compile(net, "inference", args=(X,)).eval()
    with pytest.raises(CalibrationError, match="layer '3'"):
        nmcompile.export(compiled, tmp_path / "m.onnx", (X,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "target", "message"), [("m.onx", None, r"'\.onnx'"), ("m.plan", "onnxruntime", "plan")]
)
def test_paths_say_what_is_written(quantized: nn.Module, tmp_path: Path, name: str, target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nmcompile.export(quantized, tmp_path / name, (X,), target=target)


@pytest.mark.skipif(tensorrt_support().ok, reason="TensorRT is installed")
def test_without_tensorrt_the_onnx_file_is_still_written(quantized: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="pip install"):
        nmcompile.export(quantized, tmp_path / "m.engine", (X,))
    assert nmcompile.verify(tmp_path / "m.onnx").ok


@pytest.mark.skipif(not tensorrt_support().ok, reason=tensorrt_support().reason)
def test_tensorrt_builds_the_plan(quantized: nn.Module, tmp_path: Path) -> None:
    report = nmcompile.export(quantized, tmp_path / "m.engine", (X,))
    assert (tmp_path / "m.engine").stat().st_size > 0
    assert report.engine is not None and "3" in {layer.name for layer in report.engine.layers}


def test_a_difference_fails_loudly(quantized: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that loses a weight's scale is caught, and the layer is named."""
    from nmcompile.api import export as exporting

    def halved(model: nn.Module) -> dict[str, DeployedLayer]:
        layers = deployed_layers(model)
        weight = layers["3"].weight
        wrong = type(weight)(weight.name, weight.pattern, weight.values / 2, weight.grid, _half(weight.scale))
        return layers | {"3": type(layers["3"])(layers["3"].layer, wrong, layers["3"].input)}

    monkeypatch.setattr(exporting, "deployed_layers", halved)
    with pytest.raises(ExportError, match="'3'"):
        nmcompile.export(quantized, tmp_path / "m.onnx", (X,))


def _half(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale / 2


class Called(nn.Module):
    """A model that is called with more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(
        self, x: Tensor, table: Tensor | None = None, *, shift: Tensor | None = None, double: bool = False
    ) -> Tensor:
        y: Tensor = self.layers(x)
        y = y if table is None else y @ table
        y = y if shift is None else y + shift
        return 2 * y if double else y


ROWS = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
TABLE, SHIFT = torch.eye(4) + 1, torch.arange(24.0).reshape(6, 4)
CALLS: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "a number": ((ROWS,), {"shift": torch.tensor(1.5)}),
    "another order": ((), {"shift": SHIFT, "table": TABLE, "x": ROWS}),
    "no tensor": ((ROWS,), {"double": True}),
    "a batch of one": ((ROWS[:1],), {"shift": SHIFT[1:2], "double": True}),
}


@pytest.mark.parametrize("mode", ["weights", "inference"])
@pytest.mark.parametrize("call", CALLS)
def test_verification_calls_the_model_with_the_same_kwargs(call: str, mode: str, tmp_path: Path) -> None:
    args, kwargs = CALLS[call]
    compiled = nmcompile.compile(Called().eval(), mode, args=args, kwargs=kwargs, calibration=[ROWS]).eval()
    report = nmcompile.export(compiled, tmp_path / "m.onnx", args, kwargs=kwargs)
    assert report.verification is not None and len(report.verification.runtimes) == 2
    assert all(check.relative_l2 < 1e-5 for check in report.verification.runtimes)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (X, r"args is of type Tensor; give a tuple .* args=\(x,\)"),
        ([X], r"args is of type list; give a tuple .* args=\(x,\)"),
        ((), r"no tensor; give an example of the model's inputs, args=\(x,\)"),
        ((X.numpy(),), r"no tensor; give an example of the model's inputs, args=\(x,\)"),
    ],
)
def test_args_have_to_be_a_tuple_of_tensors(quantized: nn.Module, args: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        nmcompile.export(quantized, tmp_path / "m.onnx", args)


def test_args_that_forward_does_not_take_are_refused(quantized: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Sequential does not take these args and kwargs: too many"):
        nmcompile.export(quantized, tmp_path / "m.onnx", (X, X))


class Ending(nn.Sequential):
    """A chain with an ending of its own."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        self.end = end

    def forward(self, input: Tensor) -> Any:
        return self.end(super().forward(input))


def masked(y: Tensor, value: float) -> Tensor:
    return y.masked_fill(torch.tensor([True, False, False, False]), value)


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("mode", ["weights", "inference"])
def test_equal_infinities_are_equal(mode: str, value: float, tmp_path: Path) -> None:
    model = Ending(partial(masked, value=value)).eval()
    compiled = nmcompile.compile(model, mode, args=(ROWS,), calibration=[ROWS]).eval()
    report = nmcompile.export(compiled, tmp_path / "m.onnx", (ROWS,))
    assert report.verification is not None
    assert all(check.relative_l2 < 1e-5 for check in report.verification.runtimes)


def test_an_infinite_bias_is_equal(tmp_path: Path) -> None:
    model = Ending(torch.neg).eval()
    with torch.no_grad():
        model.get_parameter("4.bias")[1] = -math.inf
    nmcompile.export(nmcompile.compile(model, "weights", args=(ROWS,)), tmp_path / "m.onnx", (ROWS,))


def test_outputs_that_are_nowhere_numbers_prove_nothing(tmp_path: Path) -> None:
    compiled = nmcompile.compile(Ending(lambda y: y / 0 * 0).eval(), "weights", args=(ROWS,))
    with pytest.raises(ExportError, match="only NaN and infinities"):
        nmcompile.export(compiled, tmp_path / "m.onnx", (ROWS,))


def test_a_constant_output_is_refused_by_its_place(tmp_path: Path) -> None:
    compiled = nmcompile.compile(Ending(lambda y: (y, 3)).eval(), "weights", args=(ROWS,))
    with pytest.raises(ExportError, match=r"Ending returns the constant 3 as output 2.*torch\.tensor\(3\)"):
        nmcompile.export(compiled, tmp_path / "m.onnx", (ROWS,))


@pytest.mark.parametrize("mode", ["weights", "inference"])
def test_float64_models_are_written_in_float32(net: nn.Module, mode: str, tmp_path: Path) -> None:
    x = X.double()
    compiled = nmcompile.compile(net.double(), mode, args=(x,), calibration=[x]).eval()
    report = nmcompile.export(compiled, tmp_path / "m.onnx", (x,))
    assert report.verification is not None and report.verification.runtimes[0].relative_l2 < 1e-5
    assert {value.type.tensor_type.elem_type for value in onnx.load(tmp_path / "m.onnx").graph.input} == {1}
    assert next(compiled.parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("mode", "dtype"), [("weights", torch.bfloat16), ("inference", torch.bfloat16), ("inference", torch.float16)]
)
def test_half_precision_that_files_do_not_hold_is_refused_first(mode: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = Ending(torch.neg).eval().to(dtype), ROWS.to(dtype)
    compiled = nmcompile.compile(model, mode, args=(x,), calibration=[x]).eval()
    with pytest.raises(ExportError, match=rf"layer '\d' has a {str(dtype)[6:]} weight.*call model\.float\(\)"):
        nmcompile.export(compiled, tmp_path / "m.onnx", (x,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_float_weights_between_quantizers_are_not_rounded(kind: str, bias: bool, tmp_path: Path) -> None:
    """ONNX Runtime would put them on its own int8 grid."""
    torch.manual_seed(0)
    widths = (8, 16, 16, 4)
    layers = [nn.Linear(n, m, bias) if kind == "linear" else nn.Conv2d(n, m, 1, bias=bias) for n, m in pairwise(widths)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).eval()
    x = torch.randn(64, 8) if kind == "linear" else torch.randn(16, 8, 4, 4)
    config = CompileConfig(ends="sparse", layers={"_default": LayerConfig(input_bits=4)})
    compiled = nmcompile.compile(model, "inference", args=(x,), config=config, calibration=[x]).eval()
    report = nmcompile.export(compiled, tmp_path / "m.onnx", (x,))
    assert report.verification is not None and report.verification.runtimes[0].relative_l2 < 1e-5
    torch.testing.assert_close(OnnxRuntimeModel(tmp_path / "m.onnx")(x), compiled(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["weights", "inference"])
@pytest.mark.parametrize("equation", ["bi,oi->bo", "bi,io->bo"])
def test_an_einsum_that_is_a_layer_is_written_with_its_zeros(equation: str, mode: str, tmp_path: Path) -> None:
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn((12, 8) if "oi" in equation else (8, 12)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x, self.weight)

    x = torch.randn(3, 4)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Einsum(), nn.Linear(12, 2)).eval()
    compiled = nmcompile.compile(net, mode, args=(x,), calibration=[(x,)] if mode == "inference" else None)
    report = nmcompile.export(compiled, tmp_path / "model.onnx", (x,))
    assert report.verification is not None and len(report.verification.runtimes) == 2
    (node,) = [node for node in report.onnx.nodes if node.layer == "2.weight"]
    assert node.op in ("MatMul", "Gemm")
    assert str(report.layers["2.weight"].weight.pattern) == "2:4"
