"""A real TensorRT parser and builder; neither needs a GPU in TensorRT-RTX."""

from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import ModelProto, TensorProto, helper

from nmcompile.backends.tensorrt import build_engine, find_tensorrt, tensorrt_support
from nmcompile.backends.tensorrt.build_log import LOGGER, recorded
from nmcompile.backends.tensorrt.progress import progress_monitor
from nmcompile.backends.tensorrt.sidecar import read_plan
from nmcompile.errors import FileError, LoweringError
from nmcompile.files.write_atomically import sha256

pytestmark = pytest.mark.skipif(not tensorrt_support().ok, reason=tensorrt_support().reason)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence the builder's complaints about CUDA without a GPU."""
    monkeypatch.setattr(LOGGER, "disabled", True)


def saved(folder: Path, model: ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("precision", ["FLOAT", "FLOAT16", "INT8"])
@pytest.mark.parametrize("sparse", [True, False])
def test_a_plan_is_built_with_its_sidecar(
    tmp_path: Path, conv_model: Callable[..., ModelProto], precision: str, sparse: bool
) -> None:
    onnx = saved(tmp_path, conv_model(precision, channels=64, out_channels=64))
    report = build_engine(onnx, tmp_path / "model.plan", batch=(1, 2, 5), sparse=sparse)
    plan, sidecar = read_plan(tmp_path / "model.plan")
    assert sidecar == report.sidecar
    assert sidecar.plan_sha256 == sha256(plan) and sidecar.onnx_sha256 == sha256(onnx.read_bytes())
    assert sidecar.shapes == {"x": [[1, 64, 4, 4], [2, 64, 4, 4], [5, 64, 4, 4]]}
    (layer,) = report.layers
    assert (layer.name, layer.precision) == ("conv", precision)
    assert layer.eligible is (precision != "FLOAT")
    assert layer.sparse is not True or sparse


def test_a_wide_output_of_an_int8_layer_is_seen_in_the_engine(
    tmp_path: Path, conv_model: Callable[..., ModelProto]
) -> None:
    onnx = saved(tmp_path, conv_model("INT8", channels=64, out_channels=64))
    (layer,) = build_engine(onnx, tmp_path / "model.plan").layers
    assert layer.sparse or "quantize its output too" in layer.reason


def test_a_fixed_batch_stays_fixed(tmp_path: Path, conv_model: Callable[..., ModelProto]) -> None:
    model = conv_model()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    report = build_engine(saved(tmp_path, model), tmp_path / "model.plan", batch=(1, 2, 5))
    assert report.sidecar.shapes == {"x": [[3, 8, 4, 4]] * 3}


def test_another_dynamic_dimension_is_refused(tmp_path: Path, conv_model: Callable[..., ModelProto]) -> None:
    model = conv_model()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(LoweringError, match=r"'x' has shape .*only the first"):
        build_engine(saved(tmp_path, model), tmp_path / "model.plan")


def test_weights_beside_the_file_are_found(tmp_path: Path, conv_model: Callable[..., ModelProto]) -> None:
    model = conv_model("FLOAT16")
    tensor = model.graph.initializer[0]
    (tmp_path / "weights").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")
    report = build_engine(saved(tmp_path, model), tmp_path / "model.plan")
    assert [layer.eligible for layer in report.layers] == [True]


def test_a_refused_node_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="frob_node", domain="unknown")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("unknown", 1)]
    model = helper.make_model(helper.make_graph([node], "graph", [x], [y]), opset_imports=domains, ir_version=8)
    with pytest.raises(LoweringError, match=r"node 'frob_node' \(Frobnicate\)"):
        build_engine(saved(tmp_path, model), tmp_path / "model.plan")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_failed_build_says_what_tensorrt_said(
    tmp_path: Path, conv_model: Callable[..., ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nmcompile.backends.tensorrt.build._shapes", lambda tensor, batch: [[1, 7, 4, 4]] * 3)
    with pytest.raises(LoweringError, match=r"built no plan:\n.*tensor x"):
        build_engine(saved(tmp_path, conv_model()), tmp_path / "model.plan")


def test_a_truncated_model_is_refused(tmp_path: Path, conv_model: Callable[..., ModelProto]) -> None:
    onnx = saved(tmp_path, conv_model())
    onnx.write_bytes(onnx.read_bytes()[:100])
    with pytest.raises(FileError, match=r"model\.onnx"):
        build_engine(onnx, tmp_path / "model.plan")


@pytest.mark.parametrize("before", [None, b"", b"damaged"])
def test_a_timing_cache_is_written_and_read(
    tmp_path: Path, conv_model: Callable[..., ModelProto], before: bytes | None
) -> None:
    cache, onnx = tmp_path / "cache", saved(tmp_path, conv_model())
    if before is not None:
        cache.write_bytes(before)
    build_engine(onnx, tmp_path / "model.plan", timing_cache=cache)
    assert len(cache.read_bytes()) > len(b"damaged")
    build_engine(onnx, tmp_path / "model.plan", timing_cache=cache)


def test_progress_is_silent_without_a_terminal(
    tmp_path: Path, conv_model: Callable[..., ModelProto], capfd: pytest.CaptureFixture[str]
) -> None:
    build_engine(saved(tmp_path, conv_model()), tmp_path / "model.plan", progress=True)
    assert "Building engine" not in capfd.readouterr().err
    assert (tmp_path / "model.plan").exists()


def test_an_interrupt_stops_the_build(
    tmp_path: Path, conv_model: Callable[..., ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar:
        n = 0

        def update(self, steps: int) -> None:
            raise KeyboardInterrupt

        def close(self) -> None: ...

    monkeypatch.setattr("nmcompile.backends.tensorrt.progress.tqdm", lambda **_: Bar())
    with pytest.raises(KeyboardInterrupt):
        build_engine(saved(tmp_path, conv_model()), tmp_path / "model.plan", progress=True)
    assert not (tmp_path / "model.plan").exists()


def test_the_monitor_counts_the_steps_of_nested_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = {}

    class Bar:
        def __init__(self, desc: str, total: int, **_: object) -> None:
            self.n, self.total, self.open = 0, total, True
            bars[desc] = self

        def update(self, steps: int) -> None:
            self.n += steps

        def close(self) -> None:
            self.open = False

    monkeypatch.setattr("nmcompile.backends.tensorrt.progress.tqdm", Bar)
    monitor = progress_monitor(find_tensorrt())
    monitor.phase_start("outer", None, 2)
    monitor.phase_start("inner", "outer", 3)
    for phase, step in [("inner", 0), ("inner", 2), ("outer", 0)]:
        assert monitor.step_complete(phase, step)
    monitor.phase_finish("inner")
    assert (bars["inner"].n, bars["inner"].open) == (3, False)
    assert (bars["outer"].n, bars["outer"].open) == (1, True)


def test_every_build_has_its_own_messages(tmp_path: Path, conv_model: Callable[..., ModelProto]) -> None:
    """TensorRT keeps the process's first logger; the messages of a second build are still seen, and only those."""
    trt = find_tensorrt()
    logs = []
    for precision in ("FLOAT", "INT8"):
        with recorded(trt) as (logger, log):
            network = trt.Builder(logger).create_network(0)
            trt.OnnxParser(network, logger).parse(conv_model(precision).SerializeToString())
        logs.append(" ".join(log.lines))
    assert "weight_dq" not in logs[0] and "weight_dq" in logs[1]
