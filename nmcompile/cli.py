"""The command line. Imports are lazy to keep `--help` quick."""

import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmcompile.errors import ConfigError, NMCompileError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from nmcompile.paper.experiment import Scale

DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32"}


class TargetError(ConfigError):
    """A package.module:factory that does not name a factory."""


@click.group()
def cli() -> None:
    """Compile, export and check PyTorch models with N:M fine-grained sparsity."""


@cli.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder with the four MNIST-style IDX files.")
@click.option("--epochs", type=click.IntRange(min=1), help="Default: 30 for small data, 4 otherwise.")
@click.option("--seed", default=0, show_default=True)
@click.option("--train-images", default=60_000, show_default=True, type=click.IntRange(min=1))
def demo(data: Path | None, epochs: int | None, seed: int, train_images: int) -> None:
    """Train a small ResNet dense and sparse on real images, compare and verify. Never downloads."""
    from nmcompile.demo.run import run_demo

    if not run_demo(data, epochs, seed, train_images):
        sys.exit(1)


@cli.command()
@click.argument("model")
@click.option("--mode", default="training", show_default=True)
@click.option("--input", "inputs", multiple=True, help="An example input, such as f32[8,3,224,224]; repeatable.")
@click.option("--full", "style", flag_value="full", help="Print a row for every layer.")
@click.option("--json", "style", flag_value="json", help="Print JSON.")
@click.option("--markdown", "style", flag_value="markdown", help="Print markdown.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the report to this file, for a browser.")
def analyze(model: str, mode: str, inputs: tuple[str, ...], style: str | None, html: Path | None) -> None:
    """Show what compile would do to MODEL, named package.module:factory. Imports and runs that code."""
    import nmcompile

    args = _examples(inputs) or None
    report = nmcompile.analyze(_factory(model)(), mode, args=args)
    if html is not None:
        report.to_html(html)
    forms = {"full": report.full, "json": report.to_json, "markdown": report.to_markdown, None: report.__str__}
    click.echo(forms[style]())


@cli.command()
@click.argument("model")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--mode", default="inference", show_default=True, help="For a factory that returns a plain model.")
@click.option("--input", "inputs", multiple=True, required=True, help="As for analyze; repeatable.")
@click.option("--calibration", help="package.module:factory of an iterable of batches, for mode inference.")
@click.option("--target", type=click.Choice(["onnxruntime", "tensorrt"]), help="The runtime that the file is for.")
@click.option("--container", default="int8", show_default=True, type=click.Choice(["int8", "int4"]))
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "fp16"]))
def export(
    model: str,
    path: Path,
    mode: str,
    inputs: tuple[str, ...],
    calibration: str | None,
    target: str | None,
    container: str,
    precision: str,
) -> None:
    """Write MODEL, named package.module:factory, to PATH (.onnx, .engine or .plan). Imports and runs that code.

    The file is compared with the model on random inputs, the same in each run.
    """
    import nmcompile

    args = _examples(inputs)
    compiled = _model(model).eval()
    if not nmcompile.is_compiled(compiled):
        batches = _factory(calibration)() if calibration else None
        compiled = nmcompile.compile(compiled, mode, args=args, calibration=batches)
    click.echo(nmcompile.export(compiled, path, args, target=target, container=container, precision=precision))


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
def inspect(path: Path) -> None:
    """List the weights of an ONNX file: which patterns they obey, and what hides their zeros. Runs no code of it."""
    from nmcompile.export import weights_table
    from nmcompile.files.open_onnx import open_onnx
    from nmcompile.files.read_weights import read_weights

    click.echo(weights_table(read_weights(open_onnx(path))))


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--pattern", help="For files that nmcompile did not write, such as 2:4.")
def verify(path: Path, pattern: str | None) -> None:
    """Count the blocks of an ONNX file's weights that break their pattern; the exit status says whether any does."""
    import nmcompile

    report = nmcompile.verify(path, pattern)
    click.echo(report)
    if not report.ok:
        sys.exit(1)


@cli.group()
def paper() -> None:
    """Reproduce the tables and figures of the paper. Never downloads."""


@paper.command("list")
def list_experiments() -> None:
    """List the experiments."""
    from nmcompile.paper.experiments import EXPERIMENTS
    from nmcompile.printable import table

    rows = [[experiment.name, experiment.title] for experiment in EXPERIMENTS.values()]
    click.echo(table(rows, ["name", "experiment"]))


@paper.command("run")
@click.argument("name")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of images, or a text file.")
@click.option("--model", help="Another network than the experiment's.")
@click.option("--scale", default="quick", show_default=True, type=click.Choice(["quick", "full"]))
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--out", default="paper", show_default=True, type=click.Path(path_type=Path), help="For results.")
def run_experiment(name: str, data: Path | None, model: str | None, scale: "Scale", seeds: int, out: Path) -> None:
    """Run the experiment NAME: train what the folder of results lacks, and show a table beside the paper's figures.

    A run that is stopped continues with the same command; it repeats at most an epoch. Start it by torchrun to train
    in several processes.
    """
    from nmcompile.paper.experiment import Options
    from nmcompile.paper.experiments import find_experiment
    from nmcompile.paper.processes import is_first, process_group
    from nmcompile.paper.report import report_findings

    experiment = find_experiment(name)
    logging.getLogger("nmcompile").setLevel(logging.ERROR)  # experiments are about accuracy, not about slow layers
    with process_group():
        findings = experiment.run(Options(out, data, model, scale, seeds))
        if is_first():
            report_findings(experiment, findings, out)


@cli.command()
def doctor() -> None:
    """Show the versions and hardware that matter."""
    import torch

    for name in ("torch", "numpy", "onnx", "onnxruntime", "nmcompile"):
        click.echo(f"{name}: {importlib.import_module(name).__version__}")
    click.echo(f"CUDA: {'available' if torch.cuda.is_available() else 'not available; everything runs on the CPU'}")


def _factory(name: str) -> Callable[[], Any]:
    """Return the user's object of that name, which must be callable without arguments."""
    if os.getcwd() not in sys.path:  # as for `python -m`
        sys.path.insert(0, os.getcwd())
    module, _, attribute = name.partition(":")
    try:
        if module.startswith("."):
            raise ImportError("the name is relative")
        factory: Callable[[], Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise TargetError(f"cannot find the model {name!r} ({error}); name it package.module:factory") from error
    reason = _refusal(factory)
    if reason:
        raise TargetError(
            f"{name!r} is not a factory ({reason}); name a function or class that is called without arguments"
        )
    return factory


def _refusal(factory: object) -> str:
    """Return why something is not a factory; "" if it is one."""
    from torch import nn

    if isinstance(factory, nn.Module) or not callable(factory):
        return f"it is of type {type(factory).__name__}"
    try:
        signature(factory).bind()
    except TypeError as error:
        return str(error)
    except ValueError:
        pass  # a builtin without a signature
    return ""


def _model(name: str) -> "nn.Module":
    from torch import nn

    model = _factory(name)()
    if not isinstance(model, nn.Module):
        raise TargetError(f"{name!r} returns something of type {type(model).__name__}; let it return an nn.Module")
    return model


def _examples(texts: Iterable[str]) -> "tuple[Tensor, ...]":
    """Return random inputs, which tell models apart: zeros stay zeros in layers without bias and standardize to NaN."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return tuple(_example(text, generator) for text in texts)


def _example(text: str, generator: "torch.Generator") -> "Tensor":
    import torch

    match = re.fullmatch(r"(\w+)\[(\d+(?:,\d+)*)\]", text.replace(" ", ""))
    if match is None or match[1] not in DTYPES:
        raise ConfigError(f"input {text!r} is not of the form f32[8,3,224,224]; dtypes: {', '.join(DTYPES)}")
    shape, dtype = [int(size) for size in match[2].split(",")], getattr(torch, DTYPES[match[1]])
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype, generator=generator)
    return torch.randint(2, shape, dtype=dtype, generator=generator)  # 0 and 1 are indices of any embedding


def main() -> None:
    """Run the console script: print an nmcompile error as one line without traceback; exit with 2 for a wrong MODEL."""
    try:
        cli()
    except NMCompileError as error:
        click.echo(f"nmcompile: {error}", err=True)
        sys.exit(2 if isinstance(error, TargetError) else 1)
