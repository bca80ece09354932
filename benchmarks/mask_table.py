"""Tables of the benchmark of masks for docs/benchmarks.md: a row for each method, a column for each pattern.

python benchmarks/mask_table.py   # writes the tables of results/masks.json between their marks in the page
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

RESULT = Path(__file__).parent / "results" / "masks.json"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
MARK = re.compile(r"(<!-- masks: (\S+), (\d+) x (\d+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table_of(results: Sequence[dict[str, Any]], model: str, calibration: Sequence[int]) -> str:
    """Return the scores of a model with this amount of calibration data; magnitude needs none."""
    own = [one for one in results if one["model"] == model]
    chosen = {(one["method"], one["pattern"]): one for one in own if one["masks"] == "magnitude" and not one["refit"]}
    chosen |= {(one["method"], one["pattern"]): one for one in own if one["calibration"] == list(calibration)}
    methods, patterns = (list(dict.fromkeys(key[place] for key in chosen)) for place in (0, 1))
    rows = [[method, *(_score(chosen.get((method, pattern))) for pattern in patterns)] for method in methods]
    return tabulate(rows, ["method", *patterns], "pipe", disable_numparse=True)


def _score(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    score = result["score"]
    return f"{score:.3f}" if score < 1 else f"{score:.3g}"


def with_tables(page: str, results: Sequence[dict[str, Any]]) -> str:
    """Return the page with the tables of these results between its marks."""
    return MARK.sub(
        lambda mark: mark[1] + table_of(results, mark[2], [int(mark[3]), int(mark[4])]) + "\n" + mark[6], page
    )


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(), json.loads(RESULT.read_text())["results"]))
