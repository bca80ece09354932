"""How much of a training step the rebuild of its masks takes, by the steady rule and by a mask of every step.

The step is that of mode "training" with masks that stand. A rebuild is timed alone: all masks of the model are made
stale, as an optimizer step makes them, and asked for.

python benchmarks/refresh.py   # prints JSON; half a minute
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from cpu_workloads import Workload, class_loss, mlp
from timing import cpu_setting, in_turns

import nmcompile
from nmcompile import CompileConfig
from nmcompile.demo.resnet import ResNet
from nmcompile.demo.training import BATCH
from nmcompile.training.find_masks import masks_of
from nmcompile.training.steady import PERIOD


def demo() -> Workload:
    return Workload(ResNet(28, 10), torch.randn(BATCH, 1, 28, 28), class_loss, CompileConfig())


WORKLOADS: dict[str, Callable[[], Workload]] = {
    f"the demo's ResNet, {BATCH} images": demo,
    "MLP 1024-4096-1024, 4096 tokens": lambda: mlp(4096),
    "MLP 1024-4096-1024, 512 tokens": lambda: mlp(512),
}


def shares(load: Workload, repeats: int) -> dict[str, float]:
    """Return the milliseconds of a step and of a rebuild, and the rebuild's share of a step under each rule."""
    model = nmcompile.compile(load.model, "training", args=(load.x,), config=replace(load.config, refresh="steady"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    masks = list(masks_of(model).values())
    before = [mask.weight().detach().clone() for mask in masks]  # type: ignore[union-attr]

    def step() -> None:
        for mask in masks:
            mask.steps = 0  # so it never completes a period
        optimizer.zero_grad()
        load.loss(model(load.x)).backward()
        optimizer.step()

    def rebuild() -> None:
        for mask in masks:
            weight = mask.weight()
            assert weight is not None
            mask.clock.expire()
            mask.current(weight, None, is_trained=True)

    def copy() -> None:
        for mask, target in zip(masks, before, strict=True):
            target.copy_(mask.weight())  # type: ignore[arg-type]

    times = in_turns({"step": step, "rebuild": rebuild, "copy of the weights": copy}, repeats)
    found = {name: statistics.median(values) for name, values in times.items()}
    rest = {"steady, % of a step": found["rebuild"] / PERIOD, "every step, % of a step": found["rebuild"]}
    return found | {name: 100 * value / found["step"] for name, value in rest.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    results = {name: shares(make(), options.repeats) for name, make in WORKLOADS.items()}
    print(json.dumps({"cpu": cpu_setting(), "workloads": results}, indent=1))


main()
