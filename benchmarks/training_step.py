"""Whole training steps, dense and sparse in turns: forward, backward, update, pruning and optimizer.

Masks are refreshed every 40 steps, more than are timed here. Each variant trains its own copy of the model: "eager";
for the MLP also "best dense", with oneDNN's linear operator, the fastest dense path on AMD; and compiled in mode
"training", with everything pruned ("sparse") or only what pays ("pays").

python benchmarks/training_step.py   # writes results/training_step.json; takes some minutes
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timing import in_turns, processor
from torch import Tensor, nn
from vision import models

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.cpu.kernels import kernel_support


@dataclass(frozen=True)
class Workload:
    """A model, a batch for it, and the configuration of its pruning."""

    model: nn.Module
    x: Tensor
    labels: Tensor
    config: CompileConfig


def mlp(tokens: int) -> Workload:
    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))
    return Workload(model, torch.randn(tokens, 1024), torch.randint(1024, (tokens,)), CompileConfig(ends="sparse"))


def resnet18(batch: int, layout: torch.memory_format) -> Workload:
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=layout)
    model = models.resnet18().to(memory_format=layout)  # type: ignore[call-overload]
    return Workload(model, x, torch.randint(1000, (batch,)), CompileConfig())


def vit_small(batch: int) -> Workload:
    model = models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536
    )
    return Workload(model, torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,)), CompileConfig())


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "MLP 1024-4096-1024, 4096 tokens": lambda: mlp(4096),
    "ResNet-18, batch 8, NCHW": lambda: resnet18(8, torch.contiguous_format),
    "ResNet-18, batch 8, channels last": lambda: resnet18(8, torch.channels_last),
    "ResNet-18, batch 32, NCHW": lambda: resnet18(32, torch.contiguous_format),
    "ResNet-18, batch 32, channels last": lambda: resnet18(32, torch.channels_last),
    "ViT-S/16, batch 8": lambda: vit_small(8),
}


class OneDnnLinear(torch.autograd.Function):
    """A linear layer whose three GEMMs run in oneDNN."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return onednn(grad_output, weight.t()), onednn(grad_output.t(), x.t()), grad_output.sum(0)


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class BestDense(nn.Module):
    """An MLP whose GEMMs run in oneDNN."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model.children():
            x = OneDnnLinear.apply(x, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else layer(x)
        return x


def variants(load: Workload) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {"eager": copy.deepcopy(load.model)}
    if isinstance(load.model, nn.Sequential):
        found["best dense"] = BestDense(copy.deepcopy(load.model))
    found["sparse"] = nmcompile.compile(copy.deepcopy(load.model), "training", config=load.config)
    paying = replace(load.config, where="pays")
    found["pays"] = nmcompile.compile(copy.deepcopy(load.model), "training", args=(load.x,), config=paying)
    return found


def stepper(model: nn.Module, load: Workload) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(load.x), load.labels).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_step.json")
    options = parser.parse_args()
    if not kernel_support().ok:
        raise SystemExit(kernel_support().reason)
    torch.manual_seed(0)
    results = []
    for name, make in WORKLOADS.items():
        load = make()
        trained = variants(load)
        times = in_turns({variant: stepper(model, load) for variant, model in trained.items()}, options.repeats)
        medians = {variant: statistics.median(found) for variant, found in times.items()}
        ratios = {
            f"{ours} over {peer}": time / medians[ours]
            for ours in ("sparse", "pays")
            for peer, time in medians.items()
            if peer not in ("sparse", "pays")
        }
        choices = [c for layer in nmcompile.inspect(trained["sparse"]).layers for c in layer.choices.values()]
        sparse = sum(choice.kernel == "sparse" for choice in choices)
        results.append(
            {"workload": name, "milliseconds": medians, "speedup": ratios, "sparse": sparse, "gemms": len(choices)}
        )
        print(f"{name}: sparse {medians['sparse']:.0f} ms;", *(f"{k} × {v:.2f}" for k, v in ratios.items()), flush=True)
    options.out.parent.mkdir(exist_ok=True)
    setting = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": processor()}
    options.out.write_text(json.dumps({**setting, "repeats": options.repeats, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
