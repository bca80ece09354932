"""Everything of the GPU half, checked and measured in eight minutes: first whether it is right, then how fast it is.

Each stage is a process with a deadline of its own. After each of them the results so far are written, with the
expected range beside each figure. `gpu_stages.py` has the table.

python benchmarks/gpu_all.py   # writes results/gpu_all.json; needs a GPU that cuSPARSELt takes
python benchmarks/gpu_all.py --stage pruning depth
"""

import argparse
import os
from pathlib import Path
from typing import Any

from gpu_stages import STAGES
from stages import run_stages
from tabulate import tabulate

HERE = Path(__file__).parent
SECONDS = 480.0
COLUMNS = "name", "figure", "low", "high", "verdict"


def show(result: dict[str, Any]) -> None:
    """Print the figures of a stage, and the end of its output if it did not end well."""
    print(f"{result['stage']}: {result['outcome']}, {result['seconds']:.0f} s", flush=True)
    if result["figures"]:
        rows = [[row[column] for column in COLUMNS] for row in result["figures"]]
        print(tabulate(rows, headers=["", "found", "at least", "at most", ""], floatfmt=".2f"), flush=True)
    if result["outcome"] != "done":
        print(*result["log"][-15:], sep="\n", flush=True)


def main() -> None:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages together")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu_all.json")
    options = parser.parse_args()
    out, root = options.out.resolve(), HERE.parent
    os.chdir(root)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    run_stages([stage for stage in STAGES if stage.name in options.stage], options.seconds, out, show)


if __name__ == "__main__":
    main()
