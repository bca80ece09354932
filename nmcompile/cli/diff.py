"""`nmcompile diff`."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def diff(before: Path, after: Path, is_json: bool) -> None:
    """Show what changed between two reports, the JSON files BEFORE and AFTER. Runs no code of theirs.

    \b
    Example:
      nmcompile analyze nmcompile.demo.resnet:build --json > before.json
      nmcompile analyze nmcompile.demo.resnet:build --json --mode weights > after.json
      nmcompile diff before.json after.json
    """
    from nmcompile.files.read_files import read_regular
    from nmcompile.report.diff import diff_reports
    from nmcompile.report.saved_report import LARGEST, read_report

    found = diff_reports(*(read_report(read_regular(path, LARGEST)) for path in (before, after)))
    click.echo(json.dumps(found.to_json(), indent=2) if is_json else found)
