"""The benchmark of masks as far as it runs without its trained models: rows, texts, the network, resumption."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = "craft", "mask_rows", "mask_table", "masks", "subjects", "texts"
with mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):  # as when the script runs
    craft, mask_rows, mask_table, masks, subjects, texts = map(importlib.import_module, NAMES)

WORDS = 8


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}


@pytest.mark.skipif(not texts.LICENCES.exists(), reason="only Debian has the licences in a folder")
def test_calibration_texts_share_next_to_nothing_with_the_evaluated_text() -> None:
    evaluated = runs_of_words(texts.evaluation_text())
    seen = {run for kind in texts.calibration_texts().values() for text in kind for run in runs_of_words(text)}
    assert evaluated and len(evaluated & seen) < 0.01 * len(evaluated)


def test_sentences_are_neither_short_nor_long() -> None:
    long = " ".join(["word"] * 51)
    assert texts.sentences(f"Too short. This one has\nenough words! {long}.") == ["This one has enough words!"]


def test_every_row_is_different_and_its_config_is_valid() -> None:
    rows = mask_rows.ROWS
    assert len({row.name for row in rows}) == len(rows)
    assert {row.config.masks for row in rows} == {"magnitude", "wanda", "sparsegpt", "admm"}
    assert {row.mode for row in rows} == {"weights", "t-weights", "inference"}


def test_craft_scores_every_second_pixel() -> None:
    model = craft.Craft().eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 96)).shape == (1, 2, 32, 48)
    assert "basenet.slice3.27.weight" in model.state_dict() and "upconv1.conv.3.bias" in model.state_dict()


def test_a_row_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    model, x, loads = nn.Sequential(*layers).eval(), torch.randn(64, 8), []

    def load(count: int, tokens: int) -> Any:
        loads.append((count, tokens))
        return subjects.Subject(model, [x], "distance", lambda pruned: (pruned(x) - model(x)).norm().item(), None, {})

    monkeypatch.setattr(masks, "LOADERS", dict.fromkeys(masks.LOADERS, load))
    out = tmp_path / "masks.json"
    for methods in ("sparsegpt", "(sparsegpt|wanda)", "(sparsegpt|wanda)", "permuted, (wanda|sparsegpt)"):
        rows = f"MiniLM-L6-v2, 2:4, {methods}$"
        monkeypatch.setattr(sys, "argv", ["masks.py", "--out", str(out), "--tokens", "16", "--rows", rows])
        masks.main()
    results = json.loads(out.read_text())["results"]
    names = ["sparsegpt", "wanda", "permuted, wanda", "permuted, sparsegpt"]
    assert [result["method"] for result in results] == names and loads == [(128, 16)] * 3
    scores = {result["method"]: result["score"] for result in results}
    assert scores["sparsegpt"] < scores["wanda"] and scores["permuted, wanda"] != scores["wanda"]


def test_the_page_holds_the_tables_of_the_results() -> None:
    page = mask_table.PAGE.read_text()
    assert page.count("<!-- masks:") == page.count("<!-- end -->") > 0
    assert mask_table.with_tables(page, json.loads(mask_table.RESULT.read_text())["results"]) == page


def test_a_table_has_a_row_for_each_method() -> None:
    results = [
        {
            "model": "net",
            "pattern": pattern,
            "method": method,
            "masks": method,
            "refit": False,
            "calibration": amount,
            "score": score,
        }
        for pattern, method, amount, score in [
            ("2:4", "magnitude", [1, 1], 61.59),
            ("4:8", "magnitude", [1, 1], 31.8),
            ("2:4", "wanda", [2, 8], 0.9571),
            ("2:4", "wanda", [4, 8], 7.0),
        ]
    ]
    lines = mask_table.table_of(results, "net", [2, 8]).splitlines()
    assert [line.replace(" ", "") for line in lines[2:]] == ["|magnitude|61.6|31.8|", "|wanda|0.957||"]
