"""`nmcompile verify`."""

import sys
from pathlib import Path

import click

from nmcompile.cli.as_json import echo_json, plain


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--pattern", help="For files that nmcompile did not write, such as 2:4.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def verify(path: Path, pattern: str | None, is_json: bool) -> None:
    """Count the blocks of an ONNX file's weights that break their pattern; the exit status says whether any does.

    \b
    Example:
      nmcompile verify model.onnx
    """
    import nmcompile

    report = nmcompile.verify(path, pattern)
    if is_json:
        echo_json(ok=report.ok, checks=plain(report.checks))
    else:
        click.echo(report)
    if not report.ok:
        sys.exit(1)
