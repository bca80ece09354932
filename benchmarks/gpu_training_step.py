"""Training steps on a GPU in bfloat16, dense and sparse in turns, in eager mode and under `torch.compile`.

The MLPs run forward and backward; whole models also run their optimizer. "training" prunes all three GEMMs, "weights"
only the weights of forward and backward (mode "t-weights"), "pays" whatever was measured to pay. Some steps run in a
row, as in training. Their time is that from their first kernel to the end of the last one, in which the GPU waits where
Python does not stay ahead of it. "busy" is the time in which kernels ran, by PyTorch's profiler. The peak memory is
that of a model that trains alone.

python benchmarks/gpu_training_step.py   # writes results/gpu_training_step.json; needs a GPU that cuSPARSELt takes
"""

import argparse
import copy
import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_workloads import WORKLOADS, Workload
from gradients import check_finite, zero_share
from timing import busy_on_gpu, gpu_setting, on_gpu
from torch import Tensor, nn

import nmcompile
from nmcompile.backends.cusparselt.library import CUSPARSELT
from nmcompile.ir.choice import Choice
from nmcompile.training import graphed_step

STEPS = 3  # steps in a row
VARIANTS = "dense", "training", "weights", "pays"


def made(variant: str, load: Workload) -> nn.Module:
    dense = copy.deepcopy(load.model).to("cuda", torch.bfloat16)
    if variant == "dense":
        return dense
    if variant == "pays":
        config = replace(load.config, where="pays")
        return nmcompile.compile(dense, "training", args=(load.x,), config=config)
    return nmcompile.compile(dense, {"weights": "t-weights"}.get(variant, variant), config=load.config)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)


def stepper(model: Callable[[Tensor], Tensor], trained: nn.Module, load: Workload) -> Callable[[], None]:
    """Return a function that makes a training step of `model` by calling the module `trained`."""
    optimizer = optimizer_of(trained)

    def step() -> None:
        trained.zero_grad()
        load.x.grad = None
        output = model(load.x)
        if load.loss is None:
            output.backward(torch.randn_like(output))
        else:
            load.loss(output).backward()
            optimizer.step()

    return step


def graphed_stepper(variant: str, load: Workload) -> Callable[[], object]:
    """Return a function that makes a training step by replaying a CUDA graph, of a model of its own."""
    if load.loss is None:
        raise SystemExit("a step without a loss and an optimizer cannot be graphed")
    model = made(variant, load)
    return partial(graphed_step(model, load.loss, optimizer_of(model), [load.x]), load.x)


def peak_of(variant: str, load: Workload) -> int:
    """Return the most bytes that are allocated at one time when a model trains alone."""
    gc.collect()
    model = made(variant, load)
    step = stepper(model, model, load)
    for _ in range(2):  # chooses kernels and creates lasting state: masks and momentum
        step()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def run(name: str, load: Workload, options: argparse.Namespace) -> dict[str, Any]:
    peaks = {variant: peak_of(variant, load) for variant in options.variants}
    models = {variant: made(variant, load) for variant in options.variants}
    steps: dict[str, Callable[[], object]] = {variant: stepper(model, model, load) for variant, model in models.items()}
    for step in steps.values():
        step()
    for variant in options.compiled:
        model = models[variant]
        steps[f"{variant}, torch.compile"] = stepper(torch.compile(model), model, load)
    steps |= {f"{variant}, graphed": graphed_stepper(variant, load) for variant in options.graphed}
    for step in steps.values():
        step()
    calls = {key: partial(repeat, step, STEPS) for key, step in steps.items()}
    times = on_gpu(calls, options.repeats, head_start=0)
    medians = {key: statistics.median(found) / STEPS for key, found in times.items()}
    busy = {key: busy_on_gpu(call) / STEPS for key, call in calls.items()}
    check_finite(models)
    choices = {variant: choices_of(model) for variant, model in models.items() if variant != "dense"}
    print(name)
    for key, time in medians.items():
        peak = f", {peaks[key] / 2**20:.0f} MiB" if key in peaks else ""
        print(f"  {key} {time:.2f} ms, busy {busy[key]:.2f} ms{peak}", flush=True)
    for variant, found in choices.items():
        print(f"  {variant}: {sum(c.kernel == 'sparse' for c in found)} of {len(found)} GEMMs sparse")
        print(*(f"    {choice}" for choice in dict.fromkeys(map(str, found))), sep="\n")
    zeros = zero_share(steps["dense"], models["dense"]) if "dense" in models else None
    print(f"  zeros among gradients: {zeros}")
    chosen = {variant: [str(choice) for choice in found] for variant, found in choices.items()}
    timed = {"milliseconds": medians, "busy": busy}
    return {"workload": name, **timed, "bytes": peaks, "zeros": zeros, "choices": chosen}


def repeat(step: Callable[[], object], count: int) -> None:
    for _ in range(count):
        step()


def choices_of(model: nn.Module) -> list[Choice]:
    return [choice for layer in nmcompile.inspect(model).layers for choice in layer.choices.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--workloads", type=int, nargs="+", default=list(range(len(WORKLOADS))), help="by number")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--compiled", nargs="*", default=list(VARIANTS), choices=VARIANTS, help="by torch.compile too")
    parser.add_argument("--graphed", nargs="*", default=[], choices=VARIANTS[1:], help="as a CUDA graph too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_training_step.json")
    options = parser.parse_args()
    if not CUSPARSELT.support().ok:
        raise SystemExit(CUSPARSELT.support().reason)
    torch.manual_seed(0)
    results = []
    for index in options.workloads:
        name, make = list(WORKLOADS.items())[index]
        results.append(run(name, make(), options))
        setting = {**gpu_setting(), "repeats": options.repeats}
        options.out.write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
