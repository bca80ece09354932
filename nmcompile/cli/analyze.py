"""`nmcompile analyze`."""

from pathlib import Path

import click

from nmcompile.cli.targets import examples_of, factory_of


@click.command()
@click.argument("model")
@click.option("--mode", default="training", show_default=True)
@click.option("--input", "inputs", multiple=True, help="An example input, such as f32[8,3,224,224]; repeatable.")
@click.option("--full", "style", flag_value="full", help="Print a row for every layer.")
@click.option("--json", "style", flag_value="json", help="Print JSON.")
@click.option("--markdown", "style", flag_value="markdown", help="Print markdown.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the report to this file, for a browser.")
def analyze(model: str, mode: str, inputs: tuple[str, ...], style: str | None, html: Path | None) -> None:
    """Show what compile would do to MODEL, named package.module:factory. Imports and runs that code.

    With --input the gain is predicted too, for this CPU and for GPUs.

    \b
    Example:
      nmcompile analyze nmcompile.demo.resnet:build --input f32[8,1,28,28] --html report.html
    """
    import nmcompile

    args = examples_of(inputs) or None
    report = nmcompile.analyze(factory_of(model)(), mode, args=args, predict=args is not None)
    if html is not None:
        report.to_html(html)
    forms = {"full": report.full, "json": report.to_json, "markdown": report.to_markdown, None: report.__str__}
    click.echo(forms[style]())
