"""Hostile files that are kept: they are read, or refused by an error of the project, and so are fresh ones."""

import importlib
import random
import sys
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
with mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
    hostile_files = importlib.import_module("hostile_files")
    reliability = importlib.import_module("reliability")

KEPT = sorted(hostile_files.CORPUS.iterdir())


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_a_kept_file_is_read_or_refused(path: Path, tmp_path: Path) -> None:
    result = hostile_files.outcome(path.suffix[1:], path.read_bytes(), tmp_path)
    assert result == "read" or result.endswith("Error")
    if path.name.startswith("refused"):
        assert result != "read"


@pytest.mark.parametrize("kind", ["choices", "config", "onnx", "report"])
def test_fresh_mutations_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    made = hostile_files.mutations(kind, hostile_files.seeds()[kind], random.Random(2))
    results = [hostile_files.outcome(kind, content, tmp_path) for content in islice(made, 40)]
    assert all(result == "read" or result.endswith("Error") for result in results)
    assert set(results) != {"read"}


def test_an_exception_of_another_kind_is_a_finding(tmp_path: Path) -> None:
    with mock.patch.object(hostile_files, "read", side_effect=KeyError("x")):
        assert hostile_files.outcome("config", b"", tmp_path) == "FAILED: KeyError: 'x'"


def test_the_page_has_the_figures_of_the_last_run() -> None:
    page = reliability.PAGE.read_text()
    found = reliability.json.loads(reliability.RESULT.read_text())
    assert reliability.with_figures(page, found) == page
    assert reliability.faults(found) == []


@pytest.mark.parametrize(
    ("section", "rows"),
    [
        ("files", {"onnx": {"read": 1, "DIED OR HUNG": 1}}),
        ("kills", {"a": {"torn files": 1}}),
        ("disk", {"a": {"changed files": 1, "files left over": 0}}),
        ("threads", {"trainings": 8, "equal bit for bit": 7}),
        ("memory", {"growth in bytes": 2**21}),
    ],
)
def test_a_broken_promise_is_told(section: str, rows: dict[str, object]) -> None:
    assert len(reliability.faults({section: rows})) == 1
