"""The cost of pruning gradients as a share of a dense training step of the CIFAR-style ResNet-18.

Each variant trains its own copy of the network, in turns with the dense one. The time of a pruning operator comes from
torch's profiler, added up over the layers.

python benchmarks/pruning_share.py   # writes benchmarks/results/pruning_share.json; takes some minutes
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from tabulate import tabulate
from timing import processor
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from vision import models

import nmcompile
from nmcompile import CompileConfig, NMPattern
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.layer_config import LayerConfig, Pruning

PRUNING = "nmcompile::cpu_prune"
# name -> operator, pattern, the paper's overhead in percent of a step (its Table 6)
VARIANTS = {
    "MVUE 1:2": ("mvue", "1:2", 15),
    "approx-MVUE 2:4": ("mvue_approx", "2:4", 27),
    "exact MVUE 2:4": ("mvue", "2:4", 95),
}


def cifar_resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 with the stem for 32 x 32 pixels."""
    model: nn.Module = models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def config_of(operator: str, pattern: str) -> CompileConfig:
    pruning = Pruning(operator, NMPattern.parse(pattern))
    return CompileConfig(layers={"_default": LayerConfig(update_gradient=pruning)})


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    optimizer.step()


def timed_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor
) -> tuple[float, float, int]:
    """Return the milliseconds of a step and of the pruning in it, and the number of pruned gradients."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        step(model, optimizer, x, labels)
        passed = time.perf_counter() - start
    pruned = [event for event in found.key_averages() if event.key == PRUNING]
    return passed * 1e3, sum(event.cpu_time_total for event in pruned) / 1e3, sum(event.count for event in pruned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pruning_share.json")
    options = parser.parse_args()
    if not kernel_support().ok:
        raise SystemExit(kernel_support().reason)
    torch.manual_seed(0)
    dense = cifar_resnet18()
    trained = {"dense": dense}
    for name, (operator, pattern, _) in VARIANTS.items():
        trained[name] = nmcompile.compile(
            copy.deepcopy(dense), "gradients", config=config_of(operator, pattern), backend="cpu"
        )
    optimizers = {name: torch.optim.SGD(model.parameters(), 0.01, 0.9) for name, model in trained.items()}
    x, labels = torch.randn(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))
    measured: dict[str, list[tuple[float, float, int]]] = {name: [] for name in trained}
    for turn in range(-1, options.repeats):
        for name, model in trained.items():
            result = timed_step(model, optimizers[name], x, labels)
            if turn >= 0:
                measured[name].append(result)

    whole = statistics.median(passed for passed, _, _ in measured["dense"])
    headers = ["variant", "step ms", "pruning ms", "pruned gradients", "% of a dense step", "the paper's %"]
    rows: list[list[object]] = [["dense", whole, 0.0, 0, 0.0, None]]
    for name, (_, _, paper) in VARIANTS.items():
        passed, pruning, counts = zip(*measured[name], strict=True)
        spent = statistics.median(pruning)
        rows.append([name, statistics.median(passed), spent, counts[0], 100 * spent / whole, paper])
    print(tabulate(rows, headers=headers, floatfmt=".2f"))
    setting = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": processor()}
    results = [dict(zip(headers, row, strict=True)) for row in rows]
    options.out.write_text(json.dumps({**setting, "batch": options.batch, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
