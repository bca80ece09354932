"""The command line: a file for each command. Imports inside them are lazy to keep `--help` quick."""

import sys

import click

from nmcompile.cli.analyze import analyze
from nmcompile.cli.bench import bench
from nmcompile.cli.bisect import bisect
from nmcompile.cli.demo import demo
from nmcompile.cli.diff import diff
from nmcompile.cli.doctor import doctor
from nmcompile.cli.export import export
from nmcompile.cli.inspect import inspect
from nmcompile.cli.paper import paper
from nmcompile.cli.targets import TargetError
from nmcompile.cli.verify import verify
from nmcompile.errors import NMCompileError


@click.group()
def cli() -> None:
    """Compile, export and check PyTorch models with N:M fine-grained sparsity."""


for command in (analyze, bench, bisect, demo, diff, doctor, export, inspect, paper, verify):
    cli.add_command(command)


def main() -> None:
    """Run the console script: print an nmcompile error as one line without traceback; exit with 2 for a wrong MODEL."""
    try:
        cli()
    except NMCompileError as error:
        click.echo(f"nmcompile: {error}", err=True)
        sys.exit(2 if isinstance(error, TargetError) else 1)
