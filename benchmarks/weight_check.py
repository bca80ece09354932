"""The cost of seeing every write to a weight: until `freeze`, a call without gradients reads the weight once more.

Times linear layers of mode "weights" in turns: the call before and after `nmcompile.freeze`, the fingerprint of the
weight alone, and a copy of the weight.

python benchmarks/weight_check.py   # writes results/weight_check.json
"""

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
from timing import in_turns, processor
from torch import nn

import nmcompile
from nmcompile.fingerprint import fingerprint

WEIGHTS = (512, 512), (1024, 1024), (4096, 1024)  # out, in
TOKENS = 1, 256, 2048
RESULT = Path(__file__).parent / "results" / "weight_check.json"


@torch.no_grad()
def row(size: tuple[int, int], tokens: int, threads: int, repeats: int) -> dict[str, float]:
    """Return milliseconds, and ratios that show the share of the check."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = nmcompile.compile(
        nn.Sequential(nn.Linear(size[1], size[0])), "weights", config=nmcompile.CompileConfig(ends="sparse")
    )
    frozen, x, weight = copy.deepcopy(model), torch.randn(tokens, size[1]), model.get_parameter("0.weight").detach()
    assert torch.equal(model(x), frozen(x))
    nmcompile.freeze(frozen)
    calls = {
        "checked": lambda: model(x),
        "frozen": lambda: frozen(x),
        "fingerprint": lambda: fingerprint(weight),
        "copy": weight.clone,
    }
    times = {name: statistics.median(found) for name, found in in_turns(calls, repeats).items()}
    ratios = {
        "checked over frozen": times["checked"] / times["frozen"],
        "fingerprint over copy": times["fingerprint"] / times["copy"],
    }
    return {"out": size[0], "in": size[1], "tokens": tokens, "threads": threads, **times, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = [row(size, tokens, threads, options.repeats) for size in WEIGHTS for tokens in TOKENS for threads in (1, 2)]
    found = {"processor": processor(), "torch": torch.__version__, "unit": "ms", "rows": rows}
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    for one in rows:
        print({key: round(value, 3) for key, value in one.items()})


if __name__ == "__main__":
    main()
