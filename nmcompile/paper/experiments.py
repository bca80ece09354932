"""All experiments, in the paper's order."""

from collections.abc import Mapping

from nmcompile.errors import ConfigError, nearest
from nmcompile.paper import eq21, eq26, fig1, fig2, refresh, table2
from nmcompile.paper.experiment import Experiment

ORDER: tuple[Experiment, ...] = (
    fig1.EXPERIMENT,
    table2.EXPERIMENT,
    eq21.EXPERIMENT,
    fig2.EXPERIMENT,
    eq26.EXPERIMENT,
    refresh.EXPERIMENT,
    refresh.LONG,
)
EXPERIMENTS: Mapping[str, Experiment] = {experiment.name: experiment for experiment in ORDER}


def find_experiment(name: str) -> Experiment:
    """Return the experiment of that name; raise for an unknown one, with the nearest name."""
    if name not in EXPERIMENTS:
        raise ConfigError(f"there is no experiment {name!r}; {nearest(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]
