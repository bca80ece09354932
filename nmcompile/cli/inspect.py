"""`nmcompile inspect`."""

from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def inspect(path: Path) -> None:
    """List the weights of an ONNX file: which patterns they obey, and what hides their zeros. Runs no code of it.

    \b
    Example:
      nmcompile inspect model.onnx
    """
    from nmcompile.export import weights_table
    from nmcompile.files.open_onnx import open_onnx
    from nmcompile.files.read_weights import read_weights

    click.echo(weights_table(read_weights(open_onnx(path))))
