"""Update GEMMs of 13008 tokens with a sparse gradient: as they are, and padded to a multiple of 64, with a copy of X.

Also says what the library's compressed form of such a gradient looks like, as far as it was found.

python benchmarks/gpu_depth.py   # writes results/gpu_depth.json; needs a GPU that cuSPARSELt takes
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from timing import gpu_setting, on_gpu

from nmcompile.backends.cusparselt.library import CUSPARSELT
from nmcompile.backends.cusparselt.operand import Operand, checked_layout
from nmcompile.backends.cusparselt.product import Product
from nmcompile.backends.cusparselt.support import Sizes, paddings
from nmcompile.pruning import draw_key

TOKENS = 13008  # 16 x 813
LAYERS = (1024, 4096), (4096, 1024)  # in, out


def measure(inputs: int, outputs: int, repeats: int) -> dict[str, Any]:
    gradient, x = (torch.randn(TOKENS, size, device="cuda", dtype=torch.bfloat16) for size in (outputs, inputs))
    operand = Operand(gradient, 0, operator="mvue", key=draw_key(device="cuda"))
    product = Product(CUSPARSELT, operand, x, by_depth=True, by_rows=True)
    forms = dict(zip(("unpadded", "padded"), paddings(product.sizes), strict=True))
    plans = {name: product.plan(sizes) for name, sizes in forms.items()}
    calls = {
        name: lambda plan=plan, sizes=forms[name]: product.run_plan(plan, sizes)
        for name, plan in plans.items()
        if plan is not None
    }
    calls["dense"] = lambda: gradient.t() @ x
    medians = {name: statistics.median(times) for name, times in on_gpu(calls, repeats).items()}
    ratio = {"padded over unpadded": medians["padded"] / medians["unpadded"]} if "unpadded" in medians else {}
    return {
        "layer": (inputs, outputs),
        "milliseconds": medians,
        "layouts": {name: layout_of(sizes) for name, sizes in forms.items()},
        **ratio,
    }


def layout_of(sizes: Sizes) -> dict[str, int | None] | None:
    """Describe the compressed form of a size, by its bytes beyond values and codes; None if it was not found."""
    layout = checked_layout(CUSPARSELT, sizes.rows, sizes.depth, torch.bfloat16, torch.device("cuda", 0))
    if layout is None:
        return None
    extra = layout.size - layout.start - sizes.rows * sizes.depth // 8
    return {"partner": layout.places.partner, "bytes without a code": extra, "filler": layout.filler}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_depth.json")
    options = parser.parse_args()
    if not CUSPARSELT.support().ok:
        raise SystemExit(CUSPARSELT.support().reason)
    torch.manual_seed(0)
    results = [measure(*layer, options.repeats) for layer in LAYERS]
    print(json.dumps(results, indent=2))
    content = {**gpu_setting(), "tokens": TOKENS, "repeats": options.repeats, "results": results}
    options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
