import errno
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nmcompile.errors import ExportError
from nmcompile.export import Example, verify_onnx, write_onnx
from nmcompile.export.write import save_model
from nmcompile.export.write.save_model import save_model as save
from nmcompile.export.write.save_model import staged_model
from nmcompile.files.open_onnx import open_onnx
from nmcompile.files.write_atomically import sha256
from tests.faults import fail_at, killed_at, steps_of

Write = Callable[[], Any]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


@pytest.fixture
def write(path: Path) -> Write:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval(), torch.randn(2, 64)
    return lambda: write_onnx(model, {}, path, (x,))


def test_large_models_keep_their_weights_in_one_file_beside(
    path: Path, net: nn.Module, images: Tensor, deploy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_model, "LARGEST", 0)
    model = deploy(net)
    report = write_onnx(model.plain, model.layers, path, (images,))
    content = next(path.parent.glob("*.data")).read_bytes()
    assert names(path.parent) == ["model.onnx", f"model.onnx.{sha256(content)[:16]}.data"]
    assert report.bytes == sum(file.stat().st_size for file in path.parent.iterdir())
    proto = onnx.load(path, load_external_data=False)
    places = {entry.value for t in proto.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert places == {names(path.parent)[1]}
    assert open_onnx(path).path == path
    assert verify_onnx(report, model.layers, model.reference, [Example((images,))]).runtimes[0].ok


def test_small_models_are_one_file(path: Path, write: Write) -> None:
    report = write()
    assert names(path.parent) == ["model.onnx"]
    assert report.bytes == path.stat().st_size
    onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


def test_same_model_gives_the_same_bytes(path: Path, write: Write) -> None:
    write()
    first = path.read_bytes()
    write()
    assert path.read_bytes() == first


def test_full_disk_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match=r"model\.onnx cannot be written \(No space left on device\)"):
        save(numbered(1), path)
    assert names(path.parent) == ["model.onnx"]
    assert path.read_bytes() == b"old"


def test_missing_folder_is_one_clear_error(path: Path) -> None:
    path.parent.rmdir()
    with pytest.raises(ExportError, match=r"cannot be written \(No such file or directory\)"):
        save(numbered(1), path)


def test_mode_is_kept_and_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"old")
    path.chmod(0o640)
    save(numbered(1), path)
    assert path.stat().st_mode & 0o777 == 0o640
    path.unlink()
    target = tmp_path / "elsewhere"
    target.write_bytes(b"kept")
    path.symlink_to(target)
    save(numbered(1), path)
    assert target.read_bytes() == b"kept"
    assert not path.is_symlink()


# Models whose weights lie beside them. Weight and bias are the number of the model, so a mix shows.


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_model, "LARGEST", 0)


def numbered(number: int) -> ir.Model:
    """Make y = x @ weight + bias, of which only the weight is large."""
    tensors = {"weight": np.full((32, 32), number, np.float32), "bias": np.full(32, number, np.float32)}
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 32]) for name in "xy")
    node = onnx.helper.make_node("Gemm", ["x", "weight", "bias"], ["y"])
    stored = [onnx.numpy_helper.from_array(content, name) for name, content in tensors.items()]
    graph = onnx.helper.make_graph([node], "graph", [x], [y], stored)
    opsets = [onnx.helper.make_opsetid("", 17)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8))


def number_of(path: Path) -> int | None:
    """Return the number of the model at `path`, after checking that it is whole; None if there is none."""
    if not path.exists():
        return None
    open_onnx(path)
    loaded = onnx.load(path)
    weight, bias = (onnx.numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer)
    assert (weight == weight.flat[0]).all() and (bias == weight.flat[0]).all()
    return int(bias[0])


def data_of(path: Path) -> list[str]:
    return [name for name in names(path.parent) if name.endswith(".data")]


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("old", [1, None])
def test_a_failure_at_any_step_leaves_the_old_model_with_its_own_weights(
    path: Path, monkeypatch: pytest.MonkeyPatch, old: int | None
) -> None:
    def prepare() -> None:
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        if old is not None:
            save(numbered(old), path)

    prepare()
    said = set()
    for step in range(steps_of(lambda: save(numbered(2), path))):
        prepare()
        before = names(path.parent)
        with monkeypatch.context() as patch:
            fail_at(patch, step)
            message = ""
            try:
                save(numbered(2), path)
            except ExportError as error:
                message = str(error)
        if "nothing was changed there" in message:
            assert number_of(path) == old and names(path.parent) == before
        else:
            assert number_of(path) == 2
        said.add(message)
        save(numbered(3), path)
        assert number_of(path) == 3 and len(names(path.parent)) == 2
    assert len(said) > 3


@pytest.mark.usefixtures("split")
def test_a_kill_at_any_step_leaves_a_whole_model_and_the_next_export_clears_up(path: Path) -> None:
    killed = 0
    for step in range(steps_of(lambda: save(numbered(2), path))):
        save(numbered(1), path)
        killed += killed_at(step, lambda: save(numbered(2), path))
        assert number_of(path) in (1, 2)
        save(numbered(3), path)
        assert number_of(path) == 3 and len(names(path.parent)) == 2
    assert killed > 10


@pytest.mark.usefixtures("split")
def test_the_old_data_goes_once_no_model_of_the_folder_names_it(path: Path) -> None:
    save(numbered(1), path)
    [first] = data_of(path)
    shutil.copy(path, path.with_name("best.onnx"))
    path.with_name("model.onnx.data").write_bytes(b"another tool's")
    path.with_name("other.onnx.0123456789abcdef.data").write_bytes(b"another model's")
    save(numbered(2), path)
    assert first in data_of(path) and len(data_of(path)) == 4
    assert (number_of(path), number_of(path.with_name("best.onnx"))) == (2, 1)
    path.with_name("best.onnx").unlink()
    save(numbered(3), path)
    assert first not in data_of(path) and len(data_of(path)) == 3


def test_a_small_model_in_the_place_of_a_large_one_leaves_no_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(save_model, "LARGEST", 0)
        save(numbered(1), path)
    save(numbered(2), path)
    assert names(path.parent) == ["model.onnx"] and number_of(path) == 2


@pytest.mark.usefixtures("split")
def test_writers_at_the_same_time_leave_the_model_of_one_of_them(path: Path) -> None:
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            for _ in range(8):
                save(numbered(number), path)
                save(numbered(0), path)  # content that all models write
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert number_of(path) == 0 and len(names(path.parent)) == 2


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("name", ["n" * 250 + ".onnx", "é\n.onnx", "..a.onnx"], ids=repr)
def test_data_has_a_name_that_every_runtime_takes(path: Path, name: str) -> None:
    path = path.with_name(name)
    save(numbered(7), path)
    assert number_of(path) == 7 and len(names(path.parent)) == 2
    assert re.fullmatch(r"[0-9a-f]{16}\.[0-9a-f]{16}\.data", data_of(path)[0])


@pytest.mark.usefixtures("split")
def test_data_has_the_mode_of_the_model(path: Path) -> None:
    save(numbered(1), path)
    path.chmod(0o600)
    save(numbered(2), path)
    assert [path.with_name(name).stat().st_mode & 0o777 for name in names(path.parent)] == [0o600, 0o600]


@pytest.mark.usefixtures("split")
def test_a_model_that_fails_its_check_takes_no_place(path: Path) -> None:
    save(numbered(1), path)
    before = names(path.parent)
    with pytest.raises(ExportError, match="not what it should be"), staged_model(path) as staged:
        save(numbered(2), staged)
        assert number_of(staged) == 2 and number_of(path) == 1
        raise ExportError("not what it should be")
    assert number_of(path) == 1 and names(path.parent) == before
