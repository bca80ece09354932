"""The command line. Imports are lazy, so that `--help` is quick."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import click

from nmcompile.errors import ConfigError, NMCompileError

DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32"}


@click.group()
def cli() -> None:
    """N:M fine-grained sparsity for PyTorch models."""


@cli.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder with the four MNIST-style IDX files.")
@click.option("--epochs", type=click.IntRange(min=1), help="Default: 30 for small data, 4 otherwise.")
@click.option("--seed", default=0, show_default=True)
@click.option("--train-images", default=60_000, show_default=True, type=click.IntRange(min=1))
def demo(data: Path | None, epochs: int | None, seed: int, train_images: int) -> None:
    """Train a small ResNet dense and sparse on real images, compare and verify. Never downloads."""
    from nmcompile.demo.training import run_demo

    if not run_demo(data, epochs, seed, train_images):
        sys.exit(1)


@cli.command()
@click.argument("model")
@click.option("--mode", default="training", show_default=True)
@click.option("--input", "inputs", multiple=True, help="An example input, such as f32[8,3,224,224]; repeatable.")
@click.option("--json", "style", flag_value="json", help="Print JSON.")
@click.option("--markdown", "style", flag_value="markdown", help="Print markdown.")
def analyze(model: str, mode: str, inputs: tuple[str, ...], style: str | None) -> None:
    """Show what compile would do to MODEL, named package.module:factory. Imports and runs that code."""
    import nmcompile

    args = tuple(_example(text) for text in inputs) or None
    report = nmcompile.analyze(_factory(model)(), mode, args=args)
    click.echo({"json": report.to_json, "markdown": report.to_markdown, None: report.__str__}[style]())


@cli.command()
def doctor() -> None:
    """Show the versions and hardware that matter."""
    import torch

    for name in ("torch", "numpy", "onnx", "onnxruntime", "nmcompile"):
        click.echo(f"{name}: {importlib.import_module(name).__version__}")
    click.echo(f"CUDA: {'available' if torch.cuda.is_available() else 'not available; everything runs on the CPU'}")


def _factory(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot find the model {name!r} ({error}); name it package.module:factory") from error


def _example(text: str) -> Any:
    import torch

    match = re.fullmatch(r"(\w+)\[(\d+(?:,\d+)*)\]", text.replace(" ", ""))
    if match is None or match[1] not in DTYPES:
        raise ConfigError(f"input {text!r} is not of the form f32[8,3,224,224]; dtypes: {', '.join(DTYPES)}")
    return torch.zeros([int(size) for size in match[2].split(",")], dtype=getattr(torch, DTYPES[match[1]]))


def main() -> None:
    """The console script: an error of nmcompile is one line, without a traceback."""
    try:
        cli()
    except NMCompileError as error:
        click.echo(f"nmcompile: {error}", err=True)
        sys.exit(1)
