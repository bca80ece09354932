"""How near single GEMMs come to what the processor's multipliers can do, with AVX-512.

First three loops of multiply-adds, on one thread: on registers; with a float from memory that all lanes share, as in
the code that the sparse kernel writes; and with a whole vector from memory, as in a compiled loop. Then dense and
sparse products, and the three GEMMs of each linear layer of ViT-S/16 and of the MLP of `training_step.py`, packing and
pruning included, beside the time of half the multiplications at the peak. A layer's operands are exchanged for others
in each call, so they come from memory as in a training step.

python benchmarks/multiplier_limits.py   # writes results/multiplier_limits.json
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path

import torch
from best_dense import onednn
from multiply_loops import OPERANDS, OPERATIONS, multiply_loop
from tabulate import tabulate
from timing import cpu_setting, in_turns
from torch.nn import functional as F

from nmcompile.backends.cpu.gemm import Geometry, sparse_backward, sparse_forward, sparse_pruned_update
from nmcompile.backends.cpu.packed_weights import Packs
from nmcompile.native import INSTRUCTION_SETS
from nmcompile.pruning import NMPattern, transposable_mask
from nmcompile.spare_memory import empty

PATTERN = NMPattern(2, 4)
LAYERS = {  # tokens, in, out
    "ViT-S/16 batch 8, qkv": (1576, 384, 1152),
    "ViT-S/16 batch 8, projection": (1576, 384, 384),
    "ViT-S/16 batch 8, fc1": (1576, 384, 1536),
    "ViT-S/16 batch 8, fc2": (1576, 1536, 384),
    "MLP, first": (4096, 1024, 4096),
    "MLP, second": (4096, 4096, 1024),
}
CACHES = 240e6  # bytes of operands in rotation

SIZE = 2048

Calls = dict[str, Callable[..., object]]


def products(size: int) -> Calls:
    """Return dense and sparse products of square matrices, the sparse one packed ahead."""
    x, weight = torch.randn(size, size), torch.randn(size, size)
    mask, output, packs = transposable_mask(weight, PATTERN), torch.empty(size, size), Packs()
    pruned = weight * mask
    return {
        "MKL": lambda: F.linear(x, pruned),
        "oneDNN": lambda: onednn(x, pruned),
        "sparse, packed ahead": lambda: sparse_forward(x, weight, mask, None, output, Geometry(), packs),
    }


class Operands:
    """Operands of a layer's GEMMs, and memory for the results of its sparse ones."""

    def __init__(self, tokens: int, inputs: int, outputs: int) -> None:
        self.x, self.grad_output = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
        self.weight = torch.randn(outputs, inputs)
        self.mask = transposable_mask(self.weight, PATTERN)
        self.pruned = self.weight * self.mask
        self.y, self.grad_input, self.grad_weight = (
            empty(self.x, torch.empty(shape, device="meta")).zero_()
            for shape in ((tokens, outputs), (tokens, inputs), (outputs, inputs))
        )

    def forward(self) -> bool:
        return sparse_forward(self.x, self.weight, self.mask, None, self.y, Geometry())

    def backward(self) -> bool:
        return sparse_backward(self.grad_output, self.weight, self.mask, self.grad_input, Geometry())

    def update(self) -> bool:
        return sparse_pruned_update(self.grad_output, self.x, self.grad_weight, "mvue", PATTERN, torch.tensor(1))


GEMMS: dict[str, Calls] = {
    "forward": {"dense": lambda o: F.linear(o.x, o.pruned), "sparse": Operands.forward},
    "backward": {"dense": lambda o: o.grad_output @ o.pruned, "sparse": Operands.backward},
    "update": {"dense": lambda o: o.grad_output.t() @ o.x, "sparse": Operands.update},
}


def measure_layer(shape: tuple[int, int, int], repeats: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each GEMM, dense and sparse, on other operands in each call."""
    size = 8 * (shape[0] * (shape[1] + shape[2]) + 2 * shape[1] * shape[2])
    sets = cycle([Operands(*shape) for _ in range(1 + int(CACHES / size))])
    found = {}
    for gemm, kernels in GEMMS.items():
        calls = {name: (lambda run=run: run(next(sets))) for name, run in kernels.items()}
        found[gemm] = medians(calls, repeats)
    return found


def medians(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in in_turns(calls, repeats).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "multiplier_limits.json")
    options = parser.parse_args()
    if INSTRUCTION_SETS[:1] != ("v4",):
        raise SystemExit("the loops are for AVX-512, which this machine does not have")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    one_thread = medians({name: multiply_loop(name) for name in OPERANDS}, options.repeats)
    rates = {f"multiply-adds, {name}": OPERATIONS / time / 1e6 for name, time in one_thread.items()}
    for name, time in medians(products(SIZE), options.repeats).items():
        rates[f"{name}, {SIZE}³"] = 2 * SIZE**3 / time / 1e6
    print(tabulate(rates.items(), headers=["what", "GF/s"], floatfmt=".0f"))
    peak = (
        2 * options.threads * max(rates[f"multiply-adds, {name}"] for name in OPERANDS)
    )  # of half the multiplications
    rows = []
    for layer in options.layers:
        for gemm, times in measure_layer(LAYERS[layer], options.repeats).items():
            bound = 2 * math.prod(LAYERS[layer]) / peak / 1e6
            rows.append({"layer": layer, "gemm": gemm, **times, "half at the peak": bound})
            print(layer, gemm, *(f"{name} {time:.2f} ms" for name, time in list(rows[-1].items())[2:]), flush=True)
    setting = {"command": sys.argv, **cpu_setting(), "repeats": options.repeats}
    options.out.write_text(json.dumps({**setting, "gigaflops": rates, "layers": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
