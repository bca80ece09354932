"""`nmcompile bisect`."""

import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmcompile.cli.targets import examples_of, factory_of, model_of, named
from nmcompile.errors import ConfigError

if TYPE_CHECKING:
    from nmcompile.config import CompileConfig

PLACE = "{config}"


@click.command()
@click.argument("model")
@click.option("--check", help="package.module:function that takes the compiled model and returns whether it is good.")
@click.option(
    "--command", help=f"A command that exits with 0 if it is good; {PLACE} stands for a CompileConfig's file."
)
@click.option("--mode", default="training", show_default=True)
@click.option("--input", "inputs", multiple=True, help="As for analyze; repeatable.")
@click.option("--calibration", help="package.module:factory of an iterable of batches, for --check in mode inference.")
@click.option("--config", type=click.Path(path_type=Path), help="JSON of the CompileConfig to start from.")
@click.option("--out", type=click.Path(path_type=Path), help="Write JSON of the CompileConfig that passes.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def bisect(
    model: str,
    check: str | None,
    command: str | None,
    mode: str,
    inputs: tuple[str, ...],
    calibration: str | None,
    config: Path | None,
    out: Path | None,
    is_json: bool,
) -> None:
    """Find the layers of MODEL, named package.module:factory, whose pruning or quantization breaks a check.

    The check is a function or a command. The result is a CompileConfig that passes it.

    \b
    Example:
      nmcompile bisect nmcompile.demo.resnet:build --command "python3 check.py {config}" --out passes.json
    """
    import nmcompile
    from nmcompile.api.bisect import bisect_config
    from nmcompile.files.read_files import LARGEST_JSON, read_regular
    from nmcompile.files.write_atomically import write_atomically

    if (check is None) == (command is None):
        raise ConfigError("give one of --check and --command")
    if command is not None and PLACE not in command:
        raise ConfigError(f"--command {command!r} takes no config, so each trial would be the same; put {PLACE} in it")
    built, args = model_of(model), examples_of(inputs) or None
    start = None if config is None else nmcompile.CompileConfig.from_json(read_regular(config, LARGEST_JSON))
    if check is not None:
        batches = factory_of(calibration)() if calibration else None
        found = nmcompile.bisect(built, named(check), mode, args=args, config=start, calibration=batches)
    else:
        found = bisect_config(built, lambda one: _succeeds(command or "", one), mode, args=args, config=start)
    if out is not None:
        write_atomically(out, f"{found.config.to_json()}\n".encode())
    click.echo(found.to_json() if is_json else found)


def _succeeds(command: str, config: "CompileConfig") -> bool:
    """Run a command without a shell on a file of the config; return whether it exits with 0."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(config.to_json())
        try:
            words = [word.replace(PLACE, str(path)) for word in shlex.split(command)]
            return subprocess.run(words, check=False, stdout=subprocess.DEVNULL).returncode == 0
        except (OSError, ValueError) as error:
            raise ConfigError(f"the command {command!r} cannot be run: {error}") from error
