"""Sweep all architectures that the table has no row for, then write the page.

python -m benchmarks.sweep            # goes on with results/coverage.csv; then writes docs/coverage.md from it
python -m benchmarks.sweep --again    # every row anew; takes about half an hour on one core
"""

import argparse
from pathlib import Path

from benchmarks.sweep.architectures import ARCHITECTURES
from benchmarks.sweep.page import PAGE, page_of
from benchmarks.sweep.run_all import run_all
from benchmarks.sweep.table import read_table

RESULT = Path(__file__).parents[1] / "results" / "coverage.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", help="these architectures alone, anew")
    parser.add_argument("--again", action="store_true", help="every row anew")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = {} if options.again else read_table(options.out)
    run_all(options.names or [one.name for one in ARCHITECTURES if one.name not in rows], options.out, rows)
    if options.out == RESULT:
        PAGE.write_text(page_of(list(rows.values())))


if __name__ == "__main__":
    main()
