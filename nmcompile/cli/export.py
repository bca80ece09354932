"""`nmcompile export`."""

from pathlib import Path

import click

from nmcompile.cli.as_json import echo_json, plain
from nmcompile.cli.targets import examples_of, factory_of, model_of


@click.command()
@click.argument("model")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--mode", default="inference", show_default=True, help="For a factory that returns a plain model.")
@click.option("--input", "inputs", multiple=True, required=True, help="As for analyze; repeatable.")
@click.option("--calibration", help="package.module:factory of an iterable of batches, for mode inference.")
@click.option("--target", type=click.Choice(["onnxruntime", "tensorrt"]), help="The runtime that the file is for.")
@click.option("--container", default="int8", show_default=True, type=click.Choice(["int8", "int4"]))
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "fp16"]))
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def export(
    model: str,
    path: Path,
    mode: str,
    inputs: tuple[str, ...],
    calibration: str | None,
    target: str | None,
    container: str,
    precision: str,
    is_json: bool,
) -> None:
    """Write MODEL, named package.module:factory, to PATH (.onnx, .engine or .plan). Imports and runs that code.

    The file is compared with the model on random inputs, the same in each run.

    \b
    Example:
      nmcompile export nmcompile.demo.resnet:build model.onnx --mode weights --input f32[8,1,28,28]
    """
    import nmcompile

    args = examples_of(inputs)
    compiled = model_of(model).eval()
    if not nmcompile.is_compiled(compiled):
        batches = factory_of(calibration)() if calibration else None
        compiled = nmcompile.compile(compiled, mode, args=args, calibration=batches)
    done = nmcompile.export(compiled, path, args, target=target, container=container, precision=precision)
    if is_json:
        echo_json(**{name: plain(getattr(done, name)) for name in ("onnx", "layers", "verification", "engine")})
    else:
        click.echo(done)
