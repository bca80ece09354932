"""Findings as a table on the screen, a JSON file and a plot."""

import json
from pathlib import Path

import click

from nmcompile.files.write_atomically import write_atomically
from nmcompile.paper.experiment import Experiment, Findings, Json
from nmcompile.paper.machine import machine
from nmcompile.paper.plots import draw_plot
from nmcompile.printable import table


def report_findings(experiment: Experiment, findings: Findings, out: Path) -> None:
    """Print the table; write NAME.json and, with matplotlib, NAME.svg into the folder `out`."""
    shown = table(findings.rows, list(findings.headers), floatfmt=".4g")
    click.echo("\n\n".join((experiment.title, shown, findings.caption)))
    click.echo("\n".join(findings.notes))
    file = out / f"{experiment.name}.json"
    content: Json = {"experiment": experiment.name, "title": experiment.title, "machine": machine(), **findings.data}
    write_json(file, content | {"headers": list(findings.headers), "rows": [list(row) for row in findings.rows]})
    click.echo(f"written: {file}")
    click.echo(draw_plot(findings, experiment.title, file.with_suffix(".svg")))


def write_json(path: Path, content: Json) -> None:
    """Write a JSON file as a whole or not at all, and its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())
