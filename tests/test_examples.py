"""The README's example, whole."""

import runpy
from pathlib import Path

import pytest


def test_quickstart_runs_and_every_block_holds(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "quickstart.py"))
    printed = capsys.readouterr().out
    assert "every block holds" in printed
    assert "same top-1 100.0%" in printed
    for name in ("\n4-bit test accuracy ", "test accuracy "):
        assert float(printed.split(name)[1].split("%")[0]) > 80
