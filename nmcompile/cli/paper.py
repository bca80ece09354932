"""`nmcompile paper`."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmcompile.cli.as_json import echo_json

if TYPE_CHECKING:
    from nmcompile.paper.experiment import Scale


@click.group()
def paper() -> None:
    """Reproduce the tables and figures of the paper. Never downloads.

    \b
    Example:
      nmcompile paper list
    """


@paper.command("list")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def list_experiments(is_json: bool) -> None:
    """List the experiments.

    \b
    Example:
      nmcompile paper list
    """
    from nmcompile.paper.experiments import EXPERIMENTS
    from nmcompile.printable import table

    rows = [[experiment.name, experiment.title] for experiment in EXPERIMENTS.values()]
    if is_json:
        echo_json(experiments=[{"name": name, "title": title} for name, title in rows])
    else:
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

    The findings are also written to NAME.json in the folder of results.

    \b
    Example:
      nmcompile paper run fig2 --out results
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
