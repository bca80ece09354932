"""An experiment: options in, findings out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from nmcompile.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["quick", "full"]
Json = dict[str, object]


@dataclass(frozen=True)
class Options:
    """The user's choices for a run.

    Args:
        out: the folder of the results and of unfinished runs.
        data: the folder of the data; by default what Debian installs.
        model: the name of a network; by default the experiment's own.
        scale: `"quick"` for minutes on a CPU, `"full"` for the paper's recipe.
        seeds: the number of runs of each row.
    """

    out: Path
    data: Path | None = None
    model: str | None = None
    scale: Scale = "quick"
    seeds: int = 5


@dataclass(frozen=True)
class Findings:
    """The result of an experiment.

    Args:
        headers, rows: the table.
        caption: says what the table and the plot show, with units; both stand alone with it.
        draw: draws the plot into an empty figure.
        data: other entries of the JSON file.
        notes: lines under the table.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str
    draw: "Callable[[Figure], None]"
    data: Json = field(default_factory=dict)
    notes: Sequence[str] = ()


class Experiment(Protocol):
    """A table or figure of the paper, or a question beyond it."""

    @property
    def name(self) -> str:
        """Return the name on the command line, and of the files."""

    @property
    def title(self) -> str:
        """Return the paper's number and the subject."""

    def run(self, options: Options) -> Findings:
        """Compute or train what is missing, and return all findings."""


@dataclass(frozen=True)
class Analysis:
    """An experiment without training: a computation that takes seconds."""

    name: str
    title: str
    compute: Callable[[], Findings]

    def run(self, options: Options) -> Findings:
        """Compute the findings.

        Raises:
            ConfigError: a folder of data or a model is given, and nothing would read it.
        """
        if options.data is not None or options.model is not None:
            raise ConfigError(f"{self.name} is computed, not trained: leave out --data and --model")
        return self.compute()
