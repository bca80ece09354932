"""Stages of a long measurement: each a command with a deadline and its expected figures, whose result is JSON."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINES = 60  # of a stage's output that are kept


@dataclass(frozen=True)
class Expected:
    """A figure of a stage, and the range in which it is expected.

    Args:
        name: for people.
        find: returns the figure from the stage's JSON; it was not measured if that raises an error.
        low, high: the range; None is open.
    """

    name: str
    find: Callable[[Any], float]
    low: float | None = None
    high: float | None = None

    def compare(self, content: Any) -> dict[str, Any]:
        """Return the figure beside its range."""
        try:
            figure = self.find(content)
        except (LookupError, StopIteration, TypeError):
            return self._row(None, "not measured")
        is_below = self.low is not None and not figure >= self.low  # a NaN is
        is_above = self.high is not None and figure > self.high
        return self._row(figure, "below" if is_below else "above" if is_above else "as expected")

    def _row(self, figure: float | None, verdict: str) -> dict[str, Any]:
        return {"name": self.name, "figure": figure, "low": self.low, "high": self.high, "verdict": verdict}


@dataclass(frozen=True)
class Stage:
    """One command of a measurement.

    Args:
        name: by which it is asked for.
        command: its arguments; "{out}" stands for the file that it writes JSON to.
        seconds: its deadline.
        expected: its figures.
    """

    name: str
    command: Sequence[str]
    seconds: float
    expected: Sequence[Expected] = ()

    def run(self, seconds: float) -> dict[str, Any]:
        """Run the command for the time that is left, up to its deadline, and return the outcome with its figures."""
        with tempfile.TemporaryDirectory() as folder:
            out, log = Path(folder, "out.json"), Path(folder, "log")
            command, start = [part.replace("{out}", str(out)) for part in self.command], time.monotonic()
            outcome = run_until(command, min(self.seconds, seconds), log) if seconds > 0 else "no time was left"
            content = _read(out)
            return {
                "stage": self.name,
                "outcome": outcome,
                "seconds": time.monotonic() - start,
                "figures": [expected.compare(content) for expected in self.expected],
                "content": content,
                "log": _last_lines(log),
            }


def run_until(command: Sequence[str], seconds: float, log: Path) -> str:
    """Run a command, or kill it and its children at the deadline, and return how it ended."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"killed after {seconds:.0f} s"
    return f"failed with status {status}" if status else "done"


def run_stages(
    stages: Sequence[Stage], seconds: float, path: Path, report: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Run stages in turn for `seconds` in all; after each, report it and write the results so far to `path`."""
    end, results = time.monotonic() + seconds, []
    for stage in stages:
        results.append(stage.run(end - time.monotonic()))
        path.write_text(json.dumps(results, indent=2) + "\n")
        report(results[-1])
    return results


def _read(path: Path) -> Any:
    """Return what a command wrote, which may have been killed while it wrote."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _last_lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-LINES:] if log.exists() else []
