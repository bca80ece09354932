"""The finished runs of an experiment, in a JSON file that is written after each of them."""

from dataclasses import asdict
from pathlib import Path

from nmcompile.errors import FileError
from nmcompile.files.read_files import parse_json, read_record, read_regular
from nmcompile.paper.processes import is_first
from nmcompile.paper.report import write_json
from nmcompile.paper.train import Configuration, Outcome

LARGEST = 2**24  # bytes


class Results:
    """The finished runs of an experiment, written after each run.

    Experiments share runs: what another experiment in the same folder has trained is not trained again.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.file = folder / f"{name}.json"
        self.checkpoint = folder / f"{name}.unfinished.safetensors"
        self.name = name
        self.outcomes = _read(self.file) if self.file.exists() else []
        self.others = [o for file in sorted(folder.glob("*.json")) if file != self.file for o in _read(file)]

    def find(self, configuration: Configuration) -> Outcome | None:
        """Return the finished run of that configuration."""
        return next((o for o in (*self.outcomes, *self.others) if o.configuration == configuration), None)

    def add(self, outcome: Outcome) -> None:
        """Count a finished run as one of this experiment; its checkpoint is of no more use."""
        if any(other.configuration == outcome.configuration for other in self.outcomes):
            return
        self.outcomes.append(outcome)
        if is_first():
            write_json(self.file, {"experiment": self.name, **self.content()})
            self.checkpoint.unlink(missing_ok=True)

    def content(self) -> dict[str, object]:
        """Return the entries of the JSON file."""
        return {"runs": [asdict(outcome) for outcome in self.outcomes]}


def _read(file: Path) -> list[Outcome]:
    """Return the runs in a file of results; a computed experiment has none."""
    document = parse_json(read_regular(file, LARGEST), str(file), largest=LARGEST)
    runs = document.get("runs", []) if isinstance(document, dict) else None
    if not isinstance(runs, list):
        raise FileError(f"{file}: holds no results of an experiment; give another folder by --out")
    return [read_record(Outcome, run, f"{file}, run {number}") for number, run in enumerate(runs)]
