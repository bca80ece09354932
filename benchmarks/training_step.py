"""Whole training steps, dense and sparse in turns: forward, backward, update, pruning and optimizer.

Masks stand: refresh.py times their rebuilds. Each variant trains its own copy of the model: "eager"; for the MLP also
"best dense", with oneDNN's linear operator, the fastest dense path on AMD; and compiled in mode
"training", with everything pruned ("sparse") or only what pays ("pays"). With `--compiled`, the variants that it names
also run under `torch.compile`.

python benchmarks/training_step.py   # writes results/training_step.json; takes some minutes
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from best_dense import BestDense
from cpu_workloads import WORKLOADS, Workload
from gradients import check_finite, zero_share
from timing import cpu_setting, in_turns
from torch import Tensor, nn

import nmcompile
from nmcompile.backends.cpu.kernels import kernel_support

VARIANTS = "eager", "best dense", "sparse", "pays"
PEERS = "eager", "best dense"


def made(variant: str, load: Workload) -> nn.Module:
    model = copy.deepcopy(load.model)
    if variant == "eager":
        return model
    if variant == "best dense":
        return BestDense(model)
    if variant == "sparse":
        return nmcompile.compile(model, "training", config=load.config)
    return nmcompile.compile(model, "training", args=(load.x,), config=replace(load.config, where="pays"))


def stepper(model: Callable[[Tensor], Tensor], trained: nn.Module, load: Workload) -> Callable[[], None]:
    """Return a function that makes a training step of `trained` by calling `model`."""
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        load.loss(model(load.x)).backward()
        optimizer.step()

    return step


def run(name: str, load: Workload, options: argparse.Namespace) -> dict[str, Any]:
    chosen = [one for one in options.variants if one != "best dense" or isinstance(load.model, nn.Sequential)]
    models = {variant: made(variant, load) for variant in chosen}
    steps = {variant: stepper(model, model, load) for variant, model in models.items()}
    for variant in options.compiled:
        if variant in models:
            steps[f"{variant}, compiled"] = stepper(torch.compile(models[variant]), models[variant], load)
    times = in_turns(steps, options.repeats)
    check_finite(models)
    medians = {variant: statistics.median(found) for variant, found in times.items()}
    shares = {
        variant: nmcompile.inspect(model).pruned_share or 0.0
        for variant, model in models.items()
        if variant not in PEERS
    }
    zeros = zero_share(steps["eager"], models["eager"]) if "eager" in models else None
    row = {"workload": name, "milliseconds": medians, "speedup": speedups(medians), "pruned share of MACs": shares}
    print(name)
    print(*(f"  {variant} {time:.1f} ms" for variant, time in medians.items()), sep="\n")
    print(*(f"  {key}: {ratio:.2f} x" for key, ratio in speedups(medians).items()), sep="\n")
    print(*(f"  {variant}: {share:.0%} of MACs pruned" for variant, share in shares.items()), sep="\n")
    print(f"  zeros among gradients: {zeros}", flush=True)
    return row | {"zeros": zeros, "kernels": {variant: kernels(models[variant]) for variant in shares}}


def speedups(medians: dict[str, float]) -> dict[str, float]:
    """Return each sparse variant over its dense peers, both under `torch.compile` or both not."""
    found = {}
    for ours in medians:
        variant, comma, how = ours.partition(",")
        for peer in PEERS:
            if variant not in PEERS and peer + comma + how in medians:
                found[f"{ours} over {peer}"] = medians[peer + comma + how] / medians[ours]
    return found


def kernels(model: nn.Module) -> dict[str, int]:
    """Return how many GEMMs ran, and how many of them by a sparse kernel."""
    choices = [choice for layer in nmcompile.inspect(model).layers for choice in layer.choices.values()]
    return {"gemms": len(choices), "sparse": sum(choice.kernel == "sparse" for choice in choices)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--workloads", type=int, nargs="+", default=list(range(len(WORKLOADS))), help="by number")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--compiled", nargs="*", default=[], choices=VARIANTS, help="by torch.compile too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_step.json")
    options = parser.parse_args()
    if not kernel_support().ok:
        raise SystemExit(kernel_support().reason)
    results = []
    for index in options.workloads:
        torch.manual_seed(0)
        name, make = list(WORKLOADS.items())[index]
        results.append(run(name, make(), options))
        setting = {"command": sys.argv, **cpu_setting(), "repeats": options.repeats}
        options.out.write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
