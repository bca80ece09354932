"""Figures of docs/reliability.md: hostile files, kills, full disks, resumption, threads, memory.

    python benchmarks/reliability.py                       # all, up to two hours; writes results/reliability.json,
                                                           # and the figures of docs/reliability.md
    python benchmarks/reliability.py --only files --files 2000 --seed 7 --out /tmp/reliability.json

Ends with 1 if anything was not as promised. Linux only.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hard_training import run_long, run_resumptions, run_threads
from hostile_files import run_fuzz
from killed_writers import run_full_disk, run_kills
from timing import cpu_setting

from nmcompile.files.write_atomically import write_atomically

RESULT = Path(__file__).parent / "results" / "reliability.json"
PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
HEAD, FOOT = "| what | how many | found |\n|---|---|---|\n", "\n\n<!-- end of the figures -->"
GROWTH = 2**20  # bytes over a long training that count as none


def faults(found: dict[str, Any]) -> list[str]:
    """Return what broke a promise."""
    bad = [f"{kind}: {one}" for kind, outcomes in found.get("files", {}).items() for one in outcomes if one.isupper()]
    for section, columns in (("kills", ("torn files",)), ("disk", ("changed files", "files left over"))):
        rows = found.get(section, {}).items()
        bad += [f"{section}, {name}: {row[column]} {column}" for name, row in rows for column in columns if row[column]]
    for section in ("resumed", "threads"):
        if section in found and found[section]["equal bit for bit"] != found[section]["trainings"]:
            bad.append(f"{section}: {found[section]}")
    if found.get("memory", {}).get("growth in bytes", 0) > GROWTH:
        bad.append(f"memory: {found['memory']}")
    return bad


def figures(found: dict[str, Any]) -> str:
    """Return the rows of the page's table."""
    rows = [
        f"| hostile files, {kind} | {sum(outcomes.values()):,} | {outcomes.get('read', 0):,} read, "
        f"{sum(n for name, n in outcomes.items() if name.endswith('Error')):,} refused by an error, "
        f"{sum(n for name, n in outcomes.items() if name.isupper()):,} else |"
        for kind, outcomes in found["files"].items()
    ]
    rows += [
        f"| kill -9 while {name} is written | {row['kills']} | {row['torn files']} torn files, "
        f"{row['files left over after the next write']} left over |"
        for name, row in found["kills"].items()
    ]
    rows += [
        f"| no room while {name} is written | {row['writes']} | {row['refused with an error']} errors, "
        f"{row['changed files']} changed files, {row['files left over']} left over |"
        for name, row in found["disk"].items()
    ]
    resumed, threads, memory = found["resumed"], found["threads"], found["memory"]
    return "\n".join(
        [
            *rows,
            f"| trainings killed at random and resumed | {resumed['trainings']}, killed {resumed['kills']} times | "
            f"{resumed['equal bit for bit']} equal to one that was not killed, bit for bit |",
            f"| trainings in {threads['threads']} threads at once | {threads['trainings']} | "
            f"{threads['equal bit for bit']} equal to the same alone, bit for bit |",
            f"| steps of one training | {memory['steps']:,} | "
            f"{memory['growth in bytes'] / 2**20:.1f} MiB more memory after the first tenth |",
        ]
    )


def with_figures(page: str, found: dict[str, Any]) -> str:
    """Return the page with the figures of a run."""
    start, end = page.index(HEAD) + len(HEAD), page.index(FOOT)
    return page[:start] + figures(found) + page[end:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=3600.0, help="after which no more hostile files are read")
    parser.add_argument("--kills", type=int, default=100, help="of each writer")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(_sections(parser.parse_args([]))))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    found["setting"] = cpu_setting()
    for name, run in _sections(options).items():
        if options.only is None or name in options.only:
            found[name] = run()
            write_atomically(options.out, (json.dumps(found, indent=1) + "\n").encode())
    if options.out == RESULT and found.keys() >= _sections(options).keys():
        PAGE.write_text(with_figures(PAGE.read_text(), found))
    for fault in faults(found):
        print(f"NOT AS PROMISED: {fault}")
    return bool(faults(found))


def _sections(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "kills": lambda: run_kills(options.kills, options.seed),
        "disk": lambda: run_full_disk(options.kills, options.seed),
        "resumed": lambda: run_resumptions(max(1, options.kills // 10), options.seed),
        "threads": lambda: run_threads(8, max(1, options.kills // 20)),
        "memory": lambda: run_long(options.steps),
        "files": lambda: run_fuzz(options.files, options.seed, options.seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
