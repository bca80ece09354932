"""The benchmarks of GPUs as far as a CPU can run them: stages with deadlines, their expected figures, and models."""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import nmcompile
from nmcompile import CompileConfig, Phase

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = "gpu_all", "gpu_stages", "llama", "stages", "timing"
with mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):  # as when one of the scripts runs
    gpu_all, gpu_stages, llama, stages, timing = map(importlib.import_module, NAMES)

WRITES = """echo working; echo '{"ratio": 1.2}' > "$0" """


def stage(name: str, script: str, seconds: float = 60.0, *expected: Any) -> Any:
    return stages.Stage(name, ("sh", "-c", script, "{out}"), seconds, expected)


def expected(low: float | None = None, high: float | None = None) -> Any:
    return stages.Expected("a ratio", lambda content: float(content["ratio"]), low, high)


def test_each_stage_is_written_before_the_next_one_runs(tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    seen: list[list[str]] = []

    def report(_: Any) -> None:
        seen.append([result["stage"] for result in json.loads(out.read_text())])

    two = stage("first", WRITES, 60, expected(1.1)), stage("second", "exit 3", 60, expected(1.1))
    results = stages.run_stages(two, 120, out, report)
    assert seen == [["first"], ["first", "second"]] and json.loads(out.read_text()) == results
    first, second = results
    assert first["outcome"] == "done" and first["content"] == {"ratio": 1.2} and first["log"] == ["working"]
    assert first["figures"][0]["verdict"] == "as expected"
    assert second["outcome"] == "failed with status 3" and second["figures"][0]["verdict"] == "not measured"


def test_a_stage_is_killed_at_its_deadline_with_its_children(tmp_path: Path) -> None:
    """It keeps what it wrote before."""
    path = tmp_path / "child"
    result = stage("slow", f"{WRITES}; sleep 600 & echo $! > {path}; wait", 2.0, expected(1.1)).run(60.0)
    assert result["outcome"] == "killed after 2 s" and result["figures"][0]["figure"] == 1.2
    process = Path("/proc", path.read_text().strip(), "stat")
    for _ in range(100):
        if not process.exists() or process.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(int(path.read_text()), 9)
    raise AssertionError("its child runs on")


def test_no_stage_runs_after_the_time_of_all(tmp_path: Path) -> None:
    two = stage("a", "sleep 600"), stage("b", WRITES)
    results = stages.run_stages(two, 0.5, tmp_path / "all.json", lambda _: None)
    assert [result["outcome"] for result in results] == ["killed after 0 s", "no time was left"]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.1, 1.3, "as expected"), (1.3, None, "below"), (None, 1.1, "above"), (None, None, "as expected")],
)
def test_figures_are_compared_with_their_range(low: float | None, high: float | None, verdict: str) -> None:
    assert expected(low, high).compare({"ratio": 1.2})["verdict"] == verdict


def test_a_figure_that_is_not_a_number_is_not_as_expected() -> None:
    assert expected(1.0).compare({"ratio": float("nan")})["verdict"] == "below"


def test_the_table_of_stages_fits_its_time_and_its_scripts() -> None:
    table = gpu_stages.STAGES
    assert len({stage.name for stage in table}) == len(table)
    assert max(stage.seconds for stage in table) < gpu_all.SECONDS
    scripts = [part for stage in table for part in stage.command if part.endswith(".py")]
    assert scripts and all(Path(BENCHMARKS.parent, script).is_file() for script in scripts)


def test_figures_are_found_in_what_the_scripts_write() -> None:
    step = {"results": [{"milliseconds": {"dense": 3.0, "training": 2.0}, "busy": {"dense": 2.0, "training": 1.0}}]}
    assert gpu_stages.speedup("milliseconds", "training")(step) == 1.5
    assert gpu_stages.figure("busy", "training")(step) == 1.0
    pruning = {"results": [{"tensor": "images", "copies": {"a call": 1.8}}]}
    assert gpu_stages.copies("images", "a call")(pruning) == 1.8


def test_the_gpu_is_busy_in_the_union_of_its_kernels() -> None:
    assert timing.covered([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 5.0
    assert timing.covered([]) == 0.0


def test_every_layer_of_a_block_is_pruned() -> None:
    model = llama.Blocks(2, 16, llama.Shape(width=32, heads=4, key_heads=2, hidden=64))
    x = torch.randn(2, 16, 32)
    dense = model(x)
    compiled = nmcompile.compile(model, "training", config=CompileConfig(ends="sparse"))
    output = compiled(x)
    layers = nmcompile.inspect(compiled).layers
    assert output.shape == dense.shape and len(layers) == 14
    assert all(layer.density(phase) == 0.5 for layer in layers for phase in Phase)


def test_a_block_attends_to_earlier_tokens_alone() -> None:
    model = llama.Blocks(1, 8, llama.Shape(width=32, heads=4, key_heads=2, hidden=64))
    x = torch.randn(1, 8, 32)
    changed = x.clone()
    changed[:, 5:] += 1.0
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
