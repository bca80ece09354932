"""Damaged and hostile ONNX files end in one clear error, before any runtime sees them."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from nmcompile.errors import FileError
from nmcompile.files import open_onnx as onnx_files
from nmcompile.files.open_onnx import open_onnx, read_tensor

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def model(*tensors: TensorProto) -> ModelProto:
    """Make y = x @ weight, with further initializers as given."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [*tensors] or [numpy_helper.from_array(WEIGHT, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def external(location: str, **fields: int) -> ModelProto:
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[3, 4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **fields}.items():
        tensor.external_data.add(key=key, value=str(value))
    return model(tensor)


def saved(folder: Path, proto: ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_a_file_and_its_bytes_are_the_same_model(tmp_path: Path) -> None:
    path = saved(tmp_path, model())
    assert open_onnx(path).proto == open_onnx(path.read_bytes()).proto == model()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = model().SerializeToString()
    for length in range(len(whole)):
        with pytest.raises(FileError):
            open_onnx(whole[:length])


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_is_refused_or_harmless(seed: int) -> None:
    """Either the error is ours, or the result is a valid model."""
    rng = np.random.default_rng(seed)
    whole = np.frombuffer(model().SerializeToString(), np.uint8)
    for _ in range(50):
        damaged = whole.copy()
        damaged[rng.integers(len(whole), size=3)] = rng.integers(256, size=3)
        try:
            opened = open_onnx(damaged.tobytes())
        except FileError:
            continue
        onnx.checker.check_model(opened.proto)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"model\.onnx"):
        open_onnx(path)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, os.mkfifo], ids=["nothing", "folder", "pipe"])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "model.onnx")
    with pytest.raises(FileError, match=r"model\.onnx"):
        open_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("raw", "dims"),
    [(True, [3, 5]), *[(raw, dims) for raw in (True, False) for dims in ([2**40], [-3, -4], [2**62, 2**62])]],
)
def test_a_tensor_that_declares_more_than_it_holds_is_refused(raw: bool, dims: list[int]) -> None:
    tensor = helper.make_tensor("weight", TensorProto.FLOAT, [3, 4], WEIGHT.tobytes() if raw else WEIGHT, raw=raw)
    tensor.dims[:] = dims
    with pytest.raises(FileError, match="weight"):
        open_onnx(model(tensor).SerializeToString())


def test_tensors_in_attributes_are_checked_too() -> None:
    tensor = numpy_helper.from_array(WEIGHT, "hidden")
    tensor.dims[:] = [2**40]
    proto = model()
    proto.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))
    with pytest.raises(FileError, match="hidden"):
        open_onnx(proto.SerializeToString())


def test_a_sparse_tensor_is_refused() -> None:
    proto = model()
    proto.graph.sparse_initializer.add(dims=[2**40])
    with pytest.raises(FileError, match="sparse"):
        open_onnx(proto.SerializeToString())


@pytest.mark.parametrize("dtype", ["INT4", "UINT4", "INT8", "FLOAT16", "BFLOAT16", "BOOL", "INT64"])
def test_the_sizes_of_all_types_are_known(dtype: str) -> None:
    """An odd number of elements leaves the last byte of packed types partly unused."""
    tensor = helper.make_tensor("extra", getattr(TensorProto, dtype), [5], [1, 0, 1, 0, 1])
    tensor = numpy_helper.from_array(numpy_helper.to_array(tensor), "extra")
    proto = model(numpy_helper.from_array(WEIGHT, "weight"), tensor)
    proto.ir_version = 10
    assert tensor.HasField("raw_data")
    assert open_onnx(proto.SerializeToString()).proto == proto


def test_weights_in_a_file_beside_the_model_are_taken(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\x00" * 8 + WEIGHT.tobytes())
    path = saved(tmp_path, external("weights", offset=8, length=WEIGHT.nbytes))
    assert open_onnx(path).path == path


@pytest.mark.parametrize("location", ["/etc/hostname", "../weights", "sub/../../weights", "C:\\weights", "..\\weights"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "weights").write_bytes(WEIGHT.tobytes())
    (tmp_path / "in" / "sub").mkdir(parents=True)
    with pytest.raises(FileError, match="outside the model's folder"):
        open_onnx(saved(tmp_path / "in", external(location)))


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
def test_a_link_to_weights_is_refused(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    link(tmp_path / "weights", tmp_path / "secret")
    with pytest.raises(FileError, match="link"):
        open_onnx(saved(tmp_path, external("weights")))


def test_a_linked_folder_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_bytes(WEIGHT.tobytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="symbolic link"):
        open_onnx(saved(tmp_path / "in", external("sub/weights")))


@pytest.mark.parametrize(
    "fields", [{"offset": 8}, {"length": 40}, {"length": 2**40}, {"offset": -8, "length": 48}, {"offset": 2**40}]
)
def test_weights_that_do_not_fill_the_tensor_are_refused(tmp_path: Path, fields: dict[str, int]) -> None:
    (tmp_path / "weights").write_bytes(WEIGHT.tobytes())
    with pytest.raises(FileError, match="weight"):
        open_onnx(saved(tmp_path, external("weights", **fields)))


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        open_onnx(saved(tmp_path, external("weights")))


def test_bytes_cannot_refer_to_other_files() -> None:
    with pytest.raises(FileError, match="give the model's path"):
        open_onnx(external("weights").SerializeToString())


@pytest.mark.parametrize(("limit", "is_read"), [(2 * WEIGHT.nbytes, True), (2 * WEIGHT.nbytes - 1, False)])
def test_all_that_is_declared_outside_the_model_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, is_read: bool
) -> None:
    """Two tensors in the same bytes count twice: a runtime allocates both."""
    (tmp_path / "weights").write_bytes(WEIGHT.tobytes())
    proto = external("weights")
    proto.graph.initializer.add().CopyFrom(proto.graph.initializer[0])
    proto.graph.initializer[1].name = "second"
    path = saved(tmp_path, proto)
    monkeypatch.setattr(onnx_files, "LARGEST_EXTERNAL", limit)
    if is_read:
        opened = open_onnx(path)
        assert all(np.array_equal(read_tensor(opened, tensor), WEIGHT) for tensor in opened.proto.graph.initializer)
    else:
        with pytest.raises(FileError, match=f"tensors of 96 bytes in other files; at most {limit} are read"):
            open_onnx(path)


def test_a_file_that_shrinks_after_the_check_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(WEIGHT.tobytes())
    opened = open_onnx(saved(tmp_path, external("weights")))
    (tmp_path / "weights").write_bytes(WEIGHT.tobytes()[:-1])
    with pytest.raises(FileError, match="tensor 'weight' cannot be read"):
        read_tensor(opened, opened.proto.graph.initializer[0])
