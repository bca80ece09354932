"""`CompileConfig(where="pays")` on whole models of torchvision and timm, batch 8: training steps beside dense ones.

A second copy of the dense model runs along. Its difference from the first is the noise of the measurement.

python benchmarks/whole_models.py   # writes results/whole_models.json; takes about eight minutes
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gradients import check_finite, zero_share
from timing import cpu_setting, in_turns
from torch import Tensor, nn
from vision import models, timm

import nmcompile
from nmcompile import CompileConfig

RESULT = Path(__file__).parent / "results" / "whole_models.json"
BATCH = 8
CLASSES = 1000


class Model(NamedTuple):
    """A model of a library, and the height and width of its images."""

    library: str
    name: str
    size: int


MODELS = (
    Model("torchvision", "alexnet", 224),
    Model("torchvision", "convnext_tiny", 128),
    Model("torchvision", "densenet121", 128),
    Model("torchvision", "efficientnet_b0", 128),
    Model("torchvision", "googlenet", 128),
    Model("torchvision", "mobilenet_v2", 128),
    Model("torchvision", "mobilenet_v3_small", 128),
    Model("torchvision", "regnet_y_400mf", 128),
    Model("torchvision", "resnet18", 128),
    Model("torchvision", "resnet34", 128),
    Model("torchvision", "resnet50", 128),
    Model("torchvision", "shufflenet_v2_x1_0", 128),
    Model("torchvision", "squeezenet1_1", 128),
    Model("timm", "levit_128s", 224),
    Model("timm", "mixer_s32_224", 224),
    Model("timm", "poolformer_s12", 128),
    Model("timm", "pvt_v2_b0", 128),
    Model("timm", "repvgg_a0", 128),
    Model("timm", "vit_tiny_patch16_224", 224),
    Model("timm", "xcit_nano_12_p16_224", 224),
)


def made(model: Model) -> nn.Module:
    """Return a model with random weights; its dropout stays on, and heads that start at zero are made random."""
    special: dict[str, Any] = {"googlenet": {"aux_logits": False, "init_weights": True}}
    if model.library == "timm":
        result: nn.Module = timm.create_model(model.name, num_classes=CLASSES)
    else:
        result = getattr(models, model.name)(num_classes=CLASSES, **special.get(model.name, {}))
    for layer in result.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.02)
    return result.train()


def stepper(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.arange(len(x)) % CLASSES

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def run(model: Model, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    plain, x = made(model), torch.randn(BATCH, 3, model.size, model.size)
    variants = {"dense": plain, "dense again": copy.deepcopy(plain)}
    config = CompileConfig(where="pays", refresh=None)
    variants["pays"] = nmcompile.compile(copy.deepcopy(plain), "training", args=(x,), config=config)
    steps = {variant: stepper(one, x) for variant, one in variants.items()}
    times = in_turns(steps, repeats)
    check_finite(variants)
    medians = {variant: statistics.median(found) for variant, found in times.items()}
    ratios = {variant: medians["dense"] / medians[variant] for variant in ("pays", "dense again")}
    share = nmcompile.inspect(variants["pays"]).pruned_share or 0.0
    zeros = zero_share(steps["dense"], plain)
    print(
        f"{model.name}: {ratios['pays']:.2f} ({ratios['dense again']:.2f}), {medians['dense']:.0f} ms dense, "
        f"{share:.0%} of MACs pruned, {zeros:.1%} of gradients zero",
        flush=True,
    )
    row = {"model": model.name, "size": model.size, "milliseconds": medians, "speedup": ratios}
    return row | {"pruned share of MACs": share, "zeros": zeros}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--models", nargs="+", default=[model.name for model in MODELS], help="by name")
    options = parser.parse_args()
    rows = []
    for model in MODELS:
        if model.name in options.models:
            rows.append(run(model, options.repeats))
            setting = {"command": sys.argv, **cpu_setting(), "timm": timm.__version__, "batch": BATCH}
            RESULT.write_text(json.dumps({**setting, "repeats": options.repeats, "results": rows}, indent=2) + "\n")
    for key in ("pays", "dense again"):
        found = sorted(row["speedup"][key] for row in rows)
        print(f"{key}: {found[0]:.2f} at least, {statistics.median(found):.2f} in the middle, {found[-1]:.2f} at most")


if __name__ == "__main__":
    main()
