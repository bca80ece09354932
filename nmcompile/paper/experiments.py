"""All experiments: those of the paper in its order, then those beyond it."""

from collections.abc import Mapping

from nmcompile.errors import ConfigError, nearest
from nmcompile.paper import (
    capacity,
    drift,
    eq21,
    eq26,
    estimators,
    fig1,
    fig2,
    fig3,
    fig4,
    fig5,
    fig6,
    masters,
    noise,
    refresh,
    settled,
    table1,
    table2,
    table3,
    table4,
    table5,
    table6,
    table7,
    tiles,
    transformer,
)
from nmcompile.paper.experiment import Experiment

ORDER: tuple[Experiment, ...] = (
    table1.EXPERIMENT,
    fig1.EXPERIMENT,
    table2.EXPERIMENT,
    eq21.EXPERIMENT,
    fig2.EXPERIMENT,
    eq26.EXPERIMENT,
    fig3.EXPERIMENT,
    fig4.EXPERIMENT,
    table3.EXPERIMENT,
    fig5.EXPERIMENT,
    table4.EXPERIMENT,
    table5.EXPERIMENT,
    fig6.EXPERIMENT,
    table6.EXPERIMENT,
    table7.EXPERIMENT,
    settled.EXPERIMENT,
    drift.EXPERIMENT,
    estimators.EXPERIMENT,
    masters.EXPERIMENT,
    tiles.EXPERIMENT,
    noise.EXPERIMENT,
    refresh.EXPERIMENT,
    refresh.LONG,
    capacity.EXPERIMENT,
    transformer.EXPERIMENT,
)
EXPERIMENTS: Mapping[str, Experiment] = {experiment.name: experiment for experiment in ORDER}


def find_experiment(name: str) -> Experiment:
    """Return the experiment of that name; raise for an unknown one, with the nearest name."""
    if name not in EXPERIMENTS:
        raise ConfigError(f"there is no experiment {name!r}; {nearest(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]
