"""`nmcompile doctor`."""

import importlib

import click


@click.command()
def doctor() -> None:
    """Show the versions and hardware that matter.

    \b
    Example:
      nmcompile doctor
    """
    import torch

    for name in ("torch", "numpy", "onnx", "onnxruntime", "nmcompile"):
        click.echo(f"{name}: {importlib.import_module(name).__version__}")
    click.echo(f"CUDA: {'available' if torch.cuda.is_available() else 'not available; everything runs on the CPU'}")
