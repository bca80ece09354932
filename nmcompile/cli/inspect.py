"""`nmcompile inspect`."""

from pathlib import Path

import click

from nmcompile.cli.as_json import echo_json, plain

SHOWN = ("node", "op", "initializer", "shape", "dtype", "groups", "precision", "hidden_by", "patterns", "zeros")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, is_json: bool) -> None:
    """List the weights of an ONNX file: which patterns they obey, and what hides their zeros. Runs no code of it.

    \b
    Example:
      nmcompile inspect model.onnx
    """
    from nmcompile.export import weights_table
    from nmcompile.files.open_onnx import open_onnx
    from nmcompile.files.read_weights import read_weights

    weights = list(read_weights(open_onnx(path)))
    if is_json:
        echo_json(weights=[{name: plain(getattr(weight, name)) for name in SHOWN} for weight in weights])
    else:
        click.echo(weights_table(weights))
