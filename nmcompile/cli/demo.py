"""`nmcompile demo`."""

import sys
from pathlib import Path

import click


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder with the four MNIST-style IDX files.")
@click.option("--epochs", type=click.IntRange(min=1), help="Default: 30 for small data, 4 otherwise.")
@click.option("--seed", default=0, show_default=True)
@click.option("--train-images", default=60_000, show_default=True, type=click.IntRange(min=1))
def demo(data: Path | None, epochs: int | None, seed: int, train_images: int) -> None:
    """Train a small ResNet dense and sparse on real images, compare and verify. Never downloads.

    \b
    Example:
      nmcompile demo --data images --epochs 1
    """
    from nmcompile.demo.run import run_demo

    if not run_demo(data, epochs, seed, train_images):
        sys.exit(1)
