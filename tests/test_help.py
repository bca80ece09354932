"""Every command's help shows an example, and each example runs as it is written."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from nmcompile.cli import cli
from nmcompile.demo.images import FILES

NEEDED = {
    "inspect": "nmcompile export nmcompile.demo.resnet:build model.onnx --mode weights --input f32[8,1,28,28]",
    "verify": "nmcompile export nmcompile.demo.resnet:build model.onnx --mode weights --input f32[8,1,28,28]",
}
"""Commands by which the files come to be that an example reads."""


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield prefix + name, command
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")


COMMANDS = dict(commands(cli))
DOCS = Path(__file__).parent.parent / "docs" / "reports.md"


def examples_of(name: str) -> list[str]:
    shown = CliRunner().invoke(cli, [*name.split(), "--help"]).output
    return [line.strip() for line in shown.split("Example:")[-1].splitlines() if line.startswith("    nmcompile ")]


def write_images(folder: Path) -> None:
    """Write the four IDX files of a small data set of images."""
    drawn = np.random.default_rng(0)
    folder.mkdir()
    for name, shape in zip(FILES, [(40, 8, 8), (40,), (8, 8, 8), (8,)], strict=True):
        array = drawn.integers(256 if len(shape) == 3 else 10, size=shape, dtype=np.uint8)
        sizes = b"".join(size.to_bytes(4, "big") for size in shape)
        (folder / name).write_bytes(bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes())


CHECK = """import json, sys
sys.exit("layers.2.conv2" not in json.load(open(sys.argv[1]))["layers"])
"""
"""A check that passes if one layer is left dense."""


def run(line: str) -> Result:
    """Run a line of the shell, which may send its output to a file."""
    words, _, file = line.partition(" > ")
    result = CliRunner().invoke(cli, shlex.split(words)[1:], catch_exceptions=False)
    assert result.exit_code == 0, f"{line}: {result.output}"
    if file:
        Path(file).write_text(result.stdout)
    return result


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "demo" else name for name in COMMANDS]
)
def test_the_example_of_a_command_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    (tmp_path / "check.py").write_text(CHECK)
    examples = examples_of(name)
    assert examples, f"nmcompile {name} --help shows no example"
    assert any(line.startswith(f"nmcompile {name}") for line in examples)
    for line in (*NEEDED.get(name, "").splitlines(), *examples):
        run(line)


SILENT = {"demo", "paper", "paper run"}
"""Commands without results of their own for programs: the last one writes them to a file."""


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - SILENT))
def test_every_command_has_versioned_json(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "check.py").write_text(CHECK)
    *before, example = [*NEEDED.get(name, "").splitlines(), *examples_of(name)]
    for line in before:
        run(line)

    def refused(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(run(f"{example} --json").stdout, parse_constant=refused)
    assert data["schema_version"] == 1 and len(data) > 1
    assert f"`nmcompile {name} --json`" in DOCS.read_text() or name == "analyze"
