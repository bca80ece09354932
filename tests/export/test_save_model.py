import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nmcompile.errors import ExportError
from nmcompile.export import Example, save_model, verify_onnx, write_onnx
from nmcompile.onnx_files import open_onnx

Write = Callable[[], Any]


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
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert report.bytes == sum(file.stat().st_size for file in path.parent.iterdir())
    proto = onnx.load(path, load_external_data=False)
    places = {entry.value for t in proto.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert places == {"model.onnx.data"}
    assert open_onnx(path).path == path
    assert verify_onnx(report, model.layers, model.reference, [Example((images,))]).runtimes[0].ok


def test_small_models_are_one_file(path: Path, write: Write) -> None:
    report = write()
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert report.bytes == path.stat().st_size
    onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


def test_same_model_gives_the_same_bytes(path: Path, write: Write) -> None:
    write()
    first = path.read_bytes()
    write()
    assert path.read_bytes() == first


def test_full_disk_leaves_the_old_file(path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match=r"model\.onnx cannot be written \(No space left on device\)"):
        write()
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"old"


def test_missing_folder_is_one_clear_error(write: Write, path: Path) -> None:
    path.parent.rmdir()
    with pytest.raises(ExportError, match=r"cannot be written \(No such file or directory\)"):
        write()


def test_mode_is_kept_and_a_link_is_not_followed(path: Path, write: Write, tmp_path: Path) -> None:
    path.write_bytes(b"old")
    path.chmod(0o640)
    write()
    assert path.stat().st_mode & 0o777 == 0o640
    path.unlink()
    target = tmp_path / "elsewhere"
    target.write_bytes(b"kept")
    path.symlink_to(target)
    write()
    assert target.read_bytes() == b"kept"
    assert not path.is_symlink()
