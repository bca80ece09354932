"""Experiments that train: rows are methods, each trained with the same seeds on the same batches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from nmcompile.errors import ConfigError
from nmcompile.paper.chart import draw_curves, draw_differences
from nmcompile.paper.data import load_data
from nmcompile.paper.experiment import Findings, Options
from nmcompile.paper.methods import Method
from nmcompile.paper.recipe import Recipe
from nmcompile.paper.results import Results
from nmcompile.paper.statistics import CONFIDENCE, paired_difference, seeds_for, spread
from nmcompile.paper.train import Outcome, Phase, Run, train_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESOLVED = 0.2  # points of accuracy
TRAIN_LOSS = "train loss"  # of the last epoch, in nats
HEADERS = ("spread", "difference", "95 % interval ±", "the paper's difference")


@dataclass(frozen=True)
class Row:
    """A row of a table: a method and the paper's figure in percent.

    Args:
        network: another network than the experiment's. The first row of a network is the reference of its others.
        phases: one for each model that the method makes.
    """

    name: str
    method: Method
    paper: float | None = None
    phases: tuple[Phase, ...] = (Phase(),)
    network: str | None = None


@dataclass(frozen=True)
class Setting:
    """The data, the network and the recipe of an experiment at one scale, and its rows if they depend on the scale."""

    data: str
    network: str
    recipe: Recipe
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """An experiment whose rows are trained.

    Args:
        rows: may be left out if every setting has its own.
        settings: by scale.
        metric: `"accuracy"` (%) or `"loss"` (nats).
        curves: whether the plot shows the metric over the epochs, as the paper's figures do.
        orders: (higher, lower): pairs of rows that the paper puts in that order, neither of them the reference.
    """

    name: str
    title: str
    settings: Mapping[str, Setting]
    caption: str
    rows: tuple[Row, ...] = ()
    metric: str = "accuracy"
    curves: bool = False
    orders: tuple[tuple[str, str], ...] = ()

    def run(self, options: Options) -> Findings:
        """Train what is missing in `options.out`, and compare.

        Raises:
            ConfigError: there is no such data or network, or no setting for the scale.
        """
        setting = self._setting(options)
        data = load_data(setting.data, options.data)
        results = Results(options.out, self.name)
        found: dict[str, list[Outcome]] = {row.name: [] for row in setting.rows}
        for seed in range(options.seeds):
            for row in setting.rows:
                run = Run(row.name, row.method, row.network or setting.network, setting.recipe, seed, row.phases)
                configuration = run.configuration(data)
                outcome = results.find(configuration) or train_run(run, data, results.checkpoint)
                results.add(outcome)
                found[row.name].append(outcome)
        return self._findings(found, results, {row.name: row.paper for row in setting.rows})

    def _setting(self, options: Options) -> Setting:
        if options.scale not in self.settings:
            raise ConfigError(f"{self.name} has no scale {options.scale!r}; it has {', '.join(self.settings)}")
        setting = self.settings[options.scale]
        rows = setting.rows or self.rows
        if options.model is not None and any(row.network is not None for row in rows):
            raise ConfigError(f"{self.name} compares networks of its own: leave out --model")
        return replace(setting, rows=rows, network=options.model or setting.network)

    def _findings(
        self, found: Mapping[str, list[Outcome]], results: Results, papers: Mapping[str, float | None]
    ) -> Findings:
        values = {name: [outcome.last(self.metric) for outcome in outcomes] for name, outcomes in found.items()}
        references = self._references(found)
        losses = {name: fmean(outcome.last(TRAIN_LOSS) for outcome in outcomes) for name, outcomes in found.items()}
        table = [[*table_row(name, values, references[name], papers), _finite(losses[name])] for name in values]
        curves = {name: _curves(outcomes, self.metric) for name, outcomes in found.items()}

        def draw(figure: "Figure") -> None:
            if self.curves:
                draw_curves(figure, curves, self.metric)
            else:
                draw_differences(figure, values, references, papers, self.metric)

        headers = ["row", "the paper", self.metric, *HEADERS, TRAIN_LOSS]
        return Findings(headers, table, self.caption, draw, results.content(), self._notes(values, references))

    def _references(self, found: Mapping[str, list[Outcome]]) -> dict[str, str]:
        """Return for each row the first row with the same network."""
        networks = {name: outcomes[0].configuration["network"] for name, outcomes in found.items()}
        return {name: next(o for o in networks if networks[o] == own) for name, own in networks.items()}

    def _notes(self, values: Mapping[str, Sequence[float]], references: Mapping[str, str]) -> list[str]:
        seeds = len(next(iter(values.values())))
        notes = [f"{seeds} seeds; rows share seeds and batches, so differences are paired ({CONFIDENCE:.0%} intervals)"]
        pairs = ((own, values[references[name]]) for name, own in values.items())
        deviations = [spread([a - b for a, b in zip(own, other, strict=True)]) or 0.0 for own, other in pairs]
        widest = max(value for value in deviations if math.isfinite(value))
        if self.metric == "accuracy" and widest:
            needed = seeds_for(widest, RESOLVED)
            notes.append(f"an interval of ±{RESOLVED} points for the row that varies most takes {needed} seeds or more")
        return notes + [f"{high} - {low}: {paired_difference(values[high], values[low])}" for high, low in self.orders]


def table_row(
    name: str, values: Mapping[str, Sequence[float]], reference: str, papers: Mapping[str, float | None]
) -> list[object]:
    """Return a row of the table; a figure of a diverged run is left out."""
    own = values[name]
    difference = paired_difference(own, values[reference])
    ours = [None, None] if name == reference else [difference.mean, difference.half_width]
    row = [papers[name], fmean(own), spread(own), *ours, paper_difference(papers, name, reference)]
    return [name, *map(_finite, row)]


def paper_difference(papers: Mapping[str, float | None], name: str, reference: str) -> float | None:
    """Return the paper's figure of a row minus that of its reference, where it has both."""
    own, other = papers[name], papers[reference]
    return None if own is None or other is None or name == reference else own - other


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _curves(outcomes: Sequence[Outcome], metric: str) -> list[list[float]]:
    """Return for each seed the metric after each epoch."""
    return [[math.nan if test[metric] is None else float(test[metric] or 0.0) for test in o.curve] for o in outcomes]
