"""A plan is code: it is read only if its sidecar was written for it."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from nmcompile.backends.tensorrt import load_engine
from nmcompile.backends.tensorrt.runtime import _check_place
from nmcompile.backends.tensorrt.sidecar import Sidecar, read_plan, sidecar_path, write_plan
from nmcompile.errors import BackendUnavailable, FileError
from nmcompile.files.write_atomically import sha256

PLAN = bytes(range(256))
SIDECAR = Sidecar("tensorrt", "11.4", "GPU A", True, {"x": [[1, 8], [2, 8], [4, 8]]}, len(PLAN), sha256(PLAN), "ab")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_plan(tmp_path / "model.plan", PLAN, SIDECAR)
    return tmp_path / "model.plan"


@pytest.mark.parametrize("pinned", [None, sha256(PLAN)])
def test_a_plan_and_its_sidecar_come_back(path: Path, pinned: str | None) -> None:
    assert read_plan(path, pinned) == (PLAN, SIDECAR)


def test_a_pinned_hash_protects_from_a_replaced_pair(path: Path) -> None:
    other = b"\x90" * len(PLAN)
    write_plan(path, other, replace(SIDECAR, plan_sha256=sha256(other)))
    assert read_plan(path)[0] == other
    with pytest.raises(FileError, match=sha256(PLAN)):
        read_plan(path, sha256(PLAN))


@pytest.mark.parametrize("length", [0, 1, 255])
def test_a_truncated_plan_is_refused(path: Path, length: int) -> None:
    path.write_bytes(PLAN[:length])
    with pytest.raises(FileError, match=f"{length} bytes, its sidecar says 256"):
        read_plan(path)


@pytest.mark.parametrize("bit", range(0, 2048, 191))
def test_a_changed_bit_is_refused(path: Path, bit: int) -> None:
    changed = bytearray(PLAN)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    with pytest.raises(FileError, match="not the plan"):
        read_plan(path)


def test_a_pin_does_not_replace_the_sidecars_hash(path: Path) -> None:
    other = b"\x90" * len(PLAN)
    path.write_bytes(other)
    with pytest.raises(FileError, match="not the plan"):
        read_plan(path, sha256(other))


@pytest.mark.parametrize("missing", ["model.plan", "model.plan.json"])
def test_a_missing_file_is_refused(path: Path, missing: str) -> None:
    path.with_name(missing).unlink()
    with pytest.raises(FileError, match=missing):
        read_plan(path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"{}", b'{"format": 2}', b'{"format": 1}', b"[" * 10**5, b" " * 2**21, b"\xff"]
)
def test_a_damaged_sidecar_is_refused(path: Path, content: bytes) -> None:
    sidecar_path(path).write_bytes(content)
    with pytest.raises(FileError, match=r"model.plan.json"):
        read_plan(path)


def test_an_unknown_field_is_refused(path: Path) -> None:
    document = json.loads(sidecar_path(path).read_bytes())
    sidecar_path(path).write_text(json.dumps({**document, "trusted": True}))
    with pytest.raises(FileError, match="trusted"):
        read_plan(path)


@pytest.mark.parametrize(
    ("flavour", "version", "gpu", "message"),
    [
        ("tensorrt_rtx", "11.4", "GPU A", "built by tensorrt 11.4, here is tensorrt_rtx 11.4"),
        ("tensorrt", "11.5", "GPU A", "built by tensorrt 11.4, here is tensorrt 11.5"),
        ("tensorrt", "11.4", "GPU B", "built for a GPU A, here is a GPU B"),
    ],
)
def test_another_tensorrt_or_gpu_is_refused(flavour: str, version: str, gpu: str, message: str) -> None:
    trt = ModuleType(flavour)
    trt.__version__ = version  # type: ignore[attr-defined]
    with pytest.raises(FileError, match=message):
        _check_place("model.plan", SIDECAR, trt, gpu)


def test_files_are_checked_before_anything_else(path: Path) -> None:
    """Without TensorRT or a GPU, a good pair fails after the check and a bad one in it."""
    path.write_bytes(PLAN[:-1])
    with pytest.raises(FileError, match="truncated"):
        load_engine(path)
    path.write_bytes(PLAN)
    with pytest.raises((BackendUnavailable, FileError), match=r"TensorRT|built"):
        load_engine(path)
