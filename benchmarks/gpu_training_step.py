"""Training steps on a GPU in bfloat16, dense and sparse in turns, each by itself and under `torch.compile`.

The MLPs run forward and backward, whole models their optimizer too. "sparse" prunes everything that mode "training"
does, "pays" what was measured to pay. Times are the GPU's; beside them, the peak of the memory of a step.

python benchmarks/gpu_training_step.py   # writes results/gpu_training_step.json; needs a GPU that cuSPARSELt takes
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timing import gpu_setting, on_gpu
from torch import Tensor, nn
from vision import models

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.cusparselt.support import cusparselt_support

ASKING = 60_000_000  # cycles: a step of a whole model is asked for in some 30 ms


@dataclass(frozen=True)
class Workload:
    """A model, a batch for it, and what is pruned."""

    model: nn.Module
    x: Tensor
    config: CompileConfig
    has_optimizer: bool = True


def mlp(tokens: int, width: int, hidden: int) -> Workload:
    model = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return Workload(model, x, CompileConfig(ends="sparse"), has_optimizer=False)


def vit_large(batch: int) -> Workload:
    model = models.vit_l_16()
    return Workload(model, torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16), CompileConfig())


def resnet50(batch: int) -> Workload:
    model = models.resnet50().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    return Workload(model, x.to(memory_format=torch.channels_last), CompileConfig())


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "MLP of ViT-L, 13008 tokens": lambda: mlp(13008, 1024, 4096),
    "MLP 4096-14336-4096, 16384 tokens": lambda: mlp(16384, 4096, 14336),
    "ViT-L/16, batch 64": lambda: vit_large(64),
    "ResNet-50, batch 256, channels last": lambda: resnet50(256),
}


def variants(load: Workload) -> dict[str, Callable[[], nn.Module]]:
    def dense() -> nn.Module:
        return copy.deepcopy(load.model).to("cuda", torch.bfloat16)

    paying = replace(load.config, where="pays")
    return {
        "dense": dense,
        "sparse": lambda: nmcompile.compile(dense(), "training", config=load.config),
        "pays": lambda: nmcompile.compile(dense(), "training", args=(load.x,), config=paying),
    }


def stepper(model: Callable[[Tensor], Tensor], trained: nn.Module, load: Workload) -> Callable[[], None]:
    """A training step of `model`, which calls the module `trained`."""
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4, momentum=0.9, fused=True) if load.has_optimizer else None

    def step() -> None:
        trained.zero_grad()
        load.x.grad = None
        output = model(load.x)
        output.backward(torch.ones_like(output))
        if optimizer is not None:
            optimizer.step()

    return step


def peak_of(make: Callable[[], nn.Module], load: Workload) -> int:
    """Bytes that are allocated at one time, all in all, when a model trains alone."""
    model = make()
    step = stepper(model, model, load)
    for _ in range(2):  # chooses kernels, and makes what lives on: masks and momentum
        step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def run(name: str, load: Workload, repeats: int, is_compiled: bool) -> dict[str, Any]:
    peaks = {key: peak_of(make, load) for key, make in variants(load).items()}
    models = {key: make() for key, make in variants(load).items()}
    steps = {key: stepper(model, model, load) for key, model in models.items()}
    for step in steps.values():
        step()
    if is_compiled:
        compiled = {key: stepper(torch.compile(model), model, load) for key, model in models.items()}
        steps |= {f"{key}, torch.compile": step for key, step in compiled.items()}
    for step in steps.values():
        step()
    medians = {key: statistics.median(times) for key, times in on_gpu(steps, repeats, asking=ASKING).items()}
    choices = [c for layer in nmcompile.inspect(models["sparse"]).layers for c in layer.choices.values()]
    sparse = sum(choice.kernel == "sparse" for choice in choices)
    print(f"{name}, {sparse} of {len(choices)} GEMMs sparse")
    for key, time in medians.items():
        print(f"  {key} {time:.2f} ms", f"{peaks[key] / 2**20:.0f} MiB" if key in peaks else "", flush=True)
    print(*(f"    {choice}" for choice in dict.fromkeys(map(str, choices))), sep="\n")
    return {"workload": name, "milliseconds": medians, "bytes": peaks, "sparse": sparse, "gemms": len(choices)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--workloads", type=int, nargs="+", default=list(range(len(WORKLOADS))), help="by number")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_training_step.json")
    options = parser.parse_args()
    if not cusparselt_support().ok:
        raise SystemExit(cusparselt_support().reason)
    torch.manual_seed(0)
    results = []
    for index in options.workloads:
        name, make = list(WORKLOADS.items())[index]
        results.append(run(name, make(), options.repeats, not options.eager))
        setting = {**gpu_setting(), "repeats": options.repeats}
        options.out.write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
