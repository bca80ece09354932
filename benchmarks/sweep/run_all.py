"""The sweep itself: each architecture in a process of its own, and the table written after each."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.sweep.architectures import ARCHITECTURES, named
from benchmarks.sweep.isolate import CONTEXT, Lost, isolated
from benchmarks.sweep.row import Row, failed_row, run_row
from benchmarks.sweep.table import write_table

SECONDS = 900  # of the clock: other processes may share the cores
BYTES = 12 * 2**30


def run_all(names: Sequence[str], out: Path, rows: dict[str, Row]) -> None:
    """Run the named architectures and write the table, in the order of `ARCHITECTURES`, after each."""
    CONTEXT.set_forkserver_preload(["benchmarks.sweep.warm"])
    for name in names:
        rows[name] = row = run_alone(name)
        write_table(out, [rows[one.name] for one in ARCHITECTURES if one.name in rows])
        verdicts = ", ".join(f"{mode} {verdict}" for mode, verdict in row.verdicts.items())
        print(f"{name}: {verdicts}; {row.shares.get('sparse', 0):.0%} sparse, {row.seconds:.0f} s", flush=True)


def run_alone(name: str) -> Row:
    """Run an architecture in a process of its own."""
    try:
        return isolated(run_named, name, seconds=SECONDS, bytes=BYTES)
    except Lost as error:
        return failed_row(named(name), str(error))


def run_named(name: str) -> Row:
    """Run the architecture of this name."""
    return run_row(named(name))
