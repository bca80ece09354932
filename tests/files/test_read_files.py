"""Other people's files: only regular ones of a bounded size are read, and JSON only in the expected shape."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import nmcompile
from nmcompile.backends.onnxruntime import OnnxRuntimeModel
from nmcompile.backends.shared.saved_choices import load_choices, save_choices
from nmcompile.backends.tensorrt import load_engine
from nmcompile.backends.tensorrt.sidecar import Sidecar, write_plan
from nmcompile.demo.images import FILES, load_images
from nmcompile.errors import ConfigError, FileError
from nmcompile.files.read_files import DEEPEST, fits, parse_json, read_record, read_regular
from nmcompile.files.write_atomically import sha256


def sparse_file(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "FIFO": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "endless pseudo-file": lambda path: path.symlink_to("/proc/self/pagemap"),
    "loop of links": lambda path: path.symlink_to(path),
    "sparse file of 10 GB": lambda path: sparse_file(path, 10**10),
}


def read_sidecar(path: Path) -> None:
    os.replace(path, path.with_name("m.plan.json")) if os.path.lexists(path) else None
    path.with_name("m.plan").write_bytes(b"plan")
    load_engine(path.with_name("m.plan"))


def read_plan(path: Path) -> None:
    sidecar = Sidecar("tensorrt", "11.4", None, True, {}, 2**33, sha256(b"plan"), "")
    write_plan(path.with_name("m.plan"), b"plan", sidecar)
    path.with_name("m.plan").unlink()
    os.replace(path, path.with_name("m.plan")) if os.path.lexists(path) else None
    load_engine(path.with_name("m.plan"))


def read_images(path: Path) -> None:
    os.replace(path, path.with_name(FILES[0])) if os.path.lexists(path) else path.with_name(FILES[0]).mkdir()
    load_images(path.parent)


READERS: dict[str, Callable[[Path], object]] = {
    "any": lambda path: read_regular(path, 2**20),
    "choices": load_choices,
    "verify": nmcompile.verify,
    "ONNX Runtime": OnnxRuntimeModel,
    "sidecar": read_sidecar,
    "plan": read_plan,
    "images": read_images,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_not_a_regular_file_of_bounded_size_is_refused_at_once(kind: str, reader: str, tmp_path: Path) -> None:
    HOSTILE[kind](tmp_path / "file")
    with pytest.raises((FileError, ConfigError), match=str(tmp_path)):
        READERS[reader](tmp_path / "file")


def test_a_regular_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    assert read_regular(tmp_path / "file", 1000) == bytes(1000)
    with pytest.raises(FileError, match="1000 bytes; at most 999"):
        read_regular(tmp_path / "file", 999)


NOT_JSON: dict[str, tuple[str | bytes, str]] = {
    "deep": ("[" * 10**5, "RecursionError|maximum recursion"),
    "deep and closed": ("[" * 200 + "]" * 200, f"{DEEPEST} deep"),
    "digits": ("9" * 5000, "5000 digits"),
    "exponent": ("1e999", "too large"),
    "NaN": ("NaN", "NaN"),
    "infinity": ("-Infinity", "Infinity"),
    "a key twice": ('{"a": 1, "a": 2}', "'a' occurs twice"),
    "other bytes": (b'"\xff"', "utf-8"),
    "UTF-16": ('"a"'.encode("utf-16"), "utf-8"),
    "size": (" " * 2**20 + "1", "1048577"),
    "rest": ("1 2", "Extra data"),
}


@pytest.mark.parametrize("case", NOT_JSON)
@pytest.mark.parametrize("error", [FileError, ConfigError])
def test_json_is_read_strictly(case: str, error: type[FileError | ConfigError]) -> None:
    text, reason = NOT_JSON[case]
    with pytest.raises(error, match=f"the text is not JSON.*({reason})"):
        parse_json(text, "the text", error=error)


@pytest.mark.parametrize("value", [None, 1.5, -(2**63), "ü", [[], {}], {"a": [1, None, True]}])
def test_json_comes_back(value: Any) -> None:
    assert parse_json(json.dumps(value), "the text") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "the text") == value


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -1], [True, 1.0, "1", None]),
        (float, [0, 1.5], [True, "1.5", None]),
        (bool, [True], [1, None]),
        (str | None, ["", None], [0, []]),
        (dict[str, list[int]], [{}, {"a": []}, {"a": [1]}], [[], {"a": 1}, {"a": [1.5]}]),
    ],
)
def test_types_are_those_that_are_declared(kind: Any, good: list[Any], bad: list[Any]) -> None:
    assert all(fits(value, kind) for value in good) and not any(fits(value, kind) for value in bad)


@dataclass(frozen=True)
class Point:
    x: int
    name: str = ""


def test_a_record_has_its_fields_and_no_others() -> None:
    assert read_record(Point, {"x": 1}, "p") == Point(1)
    for document, reason in (([], "an object with x, name"), ({"x": 1, "nam": ""}, "did you mean 'name'"), ({}, "'x'")):
        with pytest.raises(FileError, match=reason):
            read_record(Point, document, "p")
    with pytest.raises(FileError, match=r"p: 'x' is '1', expected int"):
        read_record(Point, {"x": "1"}, "p")


CHOICE = {"kernel": "sparse", "reason": "", "sparse_seconds": 1.0}
BAD_CHOICES: dict[str, Any] = {
    "text for a time": {**CHOICE, "sparse_seconds": "x"},
    "negative time": {**CHOICE, "dense_seconds": -1.0},
    "list for a time": {**CHOICE, "predicted": [1]},
    "flag for a time": {**CHOICE, "predicted": True},
    "kernel": {**CHOICE, "kernel": "sparce"},
    "no kernel": {"reason": ""},
    "no object": 3,
}


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_a_file_of_choices_is_taken_over_whole_or_not_at_all(case: str, tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    save_choices(path)
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"choices": {"good": CHOICE, "bad": BAD_CHOICES[case]}}))
    with pytest.raises(FileError, match=r"choices.json: .*; write them with save_choices"):
        load_choices(path)
    save_choices(path)
    assert json.loads(path.read_text()) == before


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 5000])
def test_a_time_is_a_number(number: str, tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    save_choices(path)
    good = json.dumps(json.loads(path.read_text()) | {"choices": {"a": CHOICE}})
    path.write_text(good.replace("1.0", number))
    with pytest.raises(FileError, match="measured choices cannot be read"):
        load_choices(path)


def test_a_pattern_in_a_file_decides_no_allocation() -> None:
    model = torch.nn.Linear(8, 8)
    for pattern in ("1:300000000000", "2:1000000000", "1:1025", f"1:{'9' * 5000}"):
        with pytest.raises(ConfigError, match=r"N < M <= 1024|of the form"):
            nmcompile.verify(model, pattern)
    assert nmcompile.verify(model, "1023:1024").checks[0].violations == 0
