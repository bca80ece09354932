"""`nmcompile bench`."""

from pathlib import Path

import click

from nmcompile.cli.targets import examples_of, factory_of, model_of


@click.command()
@click.argument("model")
@click.option("--mode", default="training", show_default=True, help="Mode inference times the forward alone.")
@click.option("--input", "inputs", multiple=True, required=True, help="As for analyze; repeatable.")
@click.option("--calibration", help="package.module:factory of an iterable of batches, for mode inference.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the faster variant's report to this file.")
def bench(
    model: str, mode: str, inputs: tuple[str, ...], calibration: str | None, is_json: bool, html: Path | None
) -> None:
    """Time a step of MODEL, named package.module:factory: dense, with all pruned, and with what pays. Runs that code.

    Tells where the time goes, the largest loss, and what to do about it.

    \b
    Example:
      nmcompile bench nmcompile.demo.resnet:build --input f32[32,1,28,28]
    """
    import nmcompile

    built = model_of(model).train(mode != "inference")
    batches = factory_of(calibration)() if calibration else None
    found = nmcompile.bench(built, mode, args=examples_of(inputs), calibration=batches)
    if html is not None:
        found.report.to_html(html)
    click.echo(found.to_json() if is_json else found)
