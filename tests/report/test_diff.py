"""The difference of two reports, against the reports themselves, and its text."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import nmcompile
from nmcompile import CompileConfig, Phase
from nmcompile.cli import cli
from nmcompile.errors import ConfigError
from nmcompile.ir.choice import Choice
from nmcompile.ir.program import ThreeGraphs
from nmcompile.report.report import Report

X = torch.randn(4, 16)
ESCAPES = "esc\x1b[31m\u202e<img src=x>"


def net(blocks: int = 4) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(blocks)))
    model.add_module(ESCAPES, nn.Linear(16, 6))
    model.add_module("last", nn.Linear(6, 4))
    return model


REPORTS: dict[str, Report] = {
    "training": nmcompile.analyze(net(), args=(X,)),
    "inference": nmcompile.analyze(net(), "inference", args=(X,), config=CompileConfig(ends="sparse")),
    "one dense": nmcompile.analyze(net(), args=(X,), config=CompileConfig(layers={"2": None})),
    "reference": nmcompile.analyze(net(), args=(X,), backend="reference"),
}
PAIRS = list(itertools.product(REPORTS, REPORTS))


def told(report: Report, name: str) -> dict[tuple[str, str], Any]:
    """Return everything that a diff compares of a layer, from the report's own objects."""
    layer = report.layer(name)
    found: dict[tuple[str, str], Any] = {("state", ""): layer.status}
    for phase in Phase:
        rows = layer.plan.rows_of(phase)
        found["plan", phase.value] = layer.operands(phase)
        found["reason", phase.value] = "; ".join(dict.fromkeys(row.reason for row in rows if row.reason))
        found["backend", phase.value] = layer.kernels.get(phase, "")
    return found


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_exactly_the_differences_of_the_layers_are_told(one: str, other: str) -> None:
    before, after = REPORTS[one], REPORTS[other]
    diff = before.diff(after)
    for layer in before.layers:
        was, is_now = told(before, layer.name), told(after, layer.name)
        expected = {key: (was[key], is_now[key]) for key in was if was[key] != is_now[key]}
        changes = {(c.what, c.phase): (c.before, c.after) for c in diff.changed.get(layer.name, ())}
        assert changes == expected
    assert diff == before.diff(after.to_json())


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_any_difference_fits_the_screen_and_hides_nothing(one: str, other: str) -> None:
    diff = REPORTS[one].diff(REPORTS[other])
    text = str(diff)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text and "\u202e" not in text
    assert ("say the same" in text) == (one == other)
    assert (r"esc\x1b[31m" in text) == (ESCAPES in diff.changed)


def test_layers_that_changed_alike_stand_under_one_name() -> None:
    text = str(REPORTS["training"].diff(REPORTS["inference"]))
    assert "\n[1-3] ×3\n" in text and "mode: training → inference" in text


def test_layers_of_one_report_alone_are_named() -> None:
    diff = REPORTS["training"].diff(nmcompile.analyze(net(6), args=(X,)))
    assert (diff.removed, diff.added) == ((), ("4", "5")) and "added: [4-5] ×2" in str(diff)
    assert nmcompile.analyze(net(6), args=(X,)).diff(REPORTS["training"]).removed == ("4", "5")


def timed(monkeypatch: pytest.MonkeyPatch, sparse: float) -> Report:
    """Return the report of a model whose GEMMs all took so many seconds, and 3 ms with dense kernels."""
    choice = Choice("sparse", "measured", None, 0.003, sparse)
    monkeypatch.setattr(ThreeGraphs, "choices", lambda _: dict.fromkeys(Phase, choice))
    model = nmcompile.compile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config=CompileConfig(ends="sparse"))
    return nmcompile.inspect(model)


@pytest.mark.parametrize(("seconds", "is_told"), [(0.00201, False), (0.0021, False), (0.004, True), (0.001, True)])
def test_times_differ_beyond_their_noise(seconds: float, is_told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    diff = timed(monkeypatch, 0.002).diff(timed(monkeypatch, seconds))
    (total,) = diff.totals
    assert [total.before, total.after] == pytest.approx([6 * 0.002, 6 * seconds])
    expected = [("time", 0.002, seconds, phase.value) for phase in Phase] if is_told else []
    found = [(c.what, c.before, c.after, c.phase) for c in diff.changed.get("1", ())]
    assert found == expected
    assert (f"[0-1] ×2\n  time: 4 ms → {seconds * 2e3:g} ms" in str(diff)) == is_told


def test_errors_of_masks_are_told_as_a_range() -> None:
    data = torch.randn(64, 16)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))

    def report(masks: str) -> Report:
        config = CompileConfig(masks=masks, ends="sparse")
        return nmcompile.inspect(nmcompile.compile(model, "weights", config=config, calibration=[data]))

    wanda, solved = report("wanda"), report("sparsegpt")
    diff = wanda.diff(solved)
    errors = {name: [c for c in changes if "error" in c.what] for name, changes in diff.changed.items()}
    for name, (change,) in errors.items():
        before, after = wanda.layer(name).found, solved.layer(name).found
        assert before is not None and after is not None
        assert (change.before, change.after) == (before.error, after.error)
    assert len(errors) == 3 and "output error of the mask: " in str(diff) and " to " in str(diff)


TIMES = dict.fromkeys(("kernel", "reason", "predicted", "dense_seconds", "sparse_seconds", "integers_seconds"), "1")
DAMAGE: dict[str, Any] = {
    "another version": lambda data: data | {"schema_version": 2},
    "no version": lambda data: {"layers": data["layers"]},
    "no layers": lambda data: {key: value for key, value in data.items() if key != "layers"},
    "a layer that is text": lambda data: data | {"layers": ["fc"]},
    "an unknown phase": lambda data: data | {"layers": [data["layers"][0] | {"choices": {"sideways": {}}}]},
    "a time that is text": lambda data: data | {"layers": [data["layers"][0] | {"choices": {"forward": TIMES}}]},
    "a list": lambda data: [data],
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_reports_are_refused(case: str) -> None:
    report = REPORTS["training"]
    damaged = json.dumps(DAMAGE[case](copy.deepcopy(json.loads(report.to_json()))))
    with pytest.raises(ConfigError, match=r"the report (has schema_version|is damaged)"):
        report.diff(damaged)


def test_the_command_compares_files(tmp_path: Path) -> None:
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    before, after = REPORTS["training"], REPORTS["inference"]
    for path, report in zip(paths, (before, after), strict=True):
        path.write_text(report.to_json())
    shown = CliRunner().invoke(cli, ["diff", *map(str, paths)], catch_exceptions=False)
    assert shown.output == f"{before.diff(after)}\n"
    shown = CliRunner().invoke(cli, ["diff", "--json", *map(str, paths)], catch_exceptions=False)
    assert json.loads(shown.output) == json.loads(json.dumps(before.diff(after).to_json()))
