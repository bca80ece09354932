"""`nmcompile verify`."""

import sys
from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--pattern", help="For files that nmcompile did not write, such as 2:4.")
def verify(path: Path, pattern: str | None) -> None:
    """Count the blocks of an ONNX file's weights that break their pattern; the exit status says whether any does.

    \b
    Example:
      nmcompile verify model.onnx
    """
    import nmcompile

    report = nmcompile.verify(path, pattern)
    click.echo(report)
    if not report.ok:
        sys.exit(1)
