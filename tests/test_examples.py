"""The README's example prints what the README shows, and the whole example of examples/ runs."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_readme_shows_what_its_example_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text()
    (code,), (shown,) = (re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL) for language in ("python", "text"))
    (tmp_path / "readme.py").write_text(code)
    runpy.run_path(str(tmp_path / "readme.py"))
    printed = capsys.readouterr().out
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


def test_quickstart_runs_and_every_block_holds(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    printed = capsys.readouterr().out
    assert "every block holds" in printed
    assert "same top-1 100.0%" in printed
    for name in ("\n4-bit test accuracy ", "test accuracy "):
        assert float(printed.split(name)[1].split("%")[0]) > 80
