"""From how many tokens on does a sparse linear layer pay?

Measures the speed-up of its forward GEMM over `F.linear` on the same pruned weight, which is packed in each call,
beside the prediction of the cost model.

python benchmarks/break_even.py   # writes results/break_even.json and, with matplotlib, results/break_even.svg
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from curves import Curve, draw_curves
from timing import in_turns, processor
from torch.nn import functional as F

from nmcompile.backends.cpu.cost import predicted_speedup
from nmcompile.backends.cpu.gemm import Geometry, sparse_forward
from nmcompile.backends.cpu.kernels import kernel_support

WEIGHTS = (256, 256), (1024, 1024), (4096, 1024)  # out, in
TOKENS = tuple(2**power for power in range(3, 13))
RESULT = Path(__file__).parent / "results" / "break_even.json"


def speedup(tokens: int, weight: torch.Tensor, repeats: int) -> float:
    x, output = torch.randn(tokens, weight.shape[1]), torch.empty(tokens, weight.shape[0])
    calls = {
        "dense": lambda: F.linear(x, weight),
        "sparse": lambda: sparse_forward(x, weight, None, None, output, Geometry()),
    }
    times = in_turns(calls, repeats)
    torch.testing.assert_close(output, F.linear(x, weight), rtol=1e-3, atol=1e-3)
    return statistics.median(times["dense"]) / statistics.median(times["sparse"])


def curves(rows: list[dict[str, float]]) -> list[Curve]:
    """Return solid lines for the measured speed-ups and dashed ones for the predicted."""
    found = []
    for color, weight in zip(("C0", "C1", "C2"), WEIGHTS, strict=True):
        chosen = [row for row in rows if (row["out"], row["in"]) == weight]
        tokens = [row["tokens"] for row in chosen]
        measured = {"color": color, "marker": "o", "label": f"{weight[0]} x {weight[1]}"}
        found.append(Curve(tokens, [row["measured"] for row in chosen], measured))
        found.append(Curve(tokens, [row["predicted"] for row in chosen], {"color": color, "linestyle": "--"}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    if not kernel_support().ok:
        raise SystemExit(kernel_support().reason)
    torch.manual_seed(0)
    threads, rows = torch.get_num_threads(), []
    for out_features, in_features in WEIGHTS:
        weight = torch.where(torch.arange(in_features) % 4 < 2, torch.randn(out_features, in_features), 0.0)
        for tokens in TOKENS:
            predicted = predicted_speedup(out_features, in_features, tokens, True, threads)
            measured = speedup(tokens, weight, options.repeats)
            rows.append(
                {"out": out_features, "in": in_features, "tokens": tokens, "measured": measured, "predicted": predicted}
            )
            print(
                f"{out_features} x {in_features}, {tokens} tokens: {measured:.2f}, predicted {predicted:.2f}",
                flush=True,
            )
    setting = {"torch": torch.__version__, "threads": threads, "machine": processor()}
    RESULT.write_text(json.dumps({**setting, "repeats": options.repeats, "results": rows}, indent=2) + "\n")
    label = "speed-up over F.linear; dashed: predicted"
    draw_curves(curves(rows), label, "weight, out x in", RESULT.with_suffix(".svg"))


if __name__ == "__main__":
    main()
