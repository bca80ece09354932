"""Accuracy of the inference schemes A and B on Fashion-MNIST, beside two-bit quantization (the paper's Table 5).

Every method sees the same batches for the same number of epochs. Methods with two phases spend half of them in full
precision and half quantized.

    python benchmarks/schemes.py          # writes benchmarks/results/schemes.json
"""

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from low_bit_baselines import METHODS
from tabulate import tabulate
from torch import nn

from nmcompile.api.recipes import scheme_a, scheme_b
from nmcompile.demo.images import Images, load_images
from nmcompile.demo.resnet import ResNet
from nmcompile.demo.training import batches, evaluate
from nmcompile.training import clips

LEARNING_RATE = 0.1
QAT_RATE = 0.02


def train(model: nn.Module, images: Images, count: int, epochs: int, seed: int, rate: float) -> None:
    own = {id(parameter) for parameter in clips(model)}
    groups = [{"params": [p for p in model.parameters() if id(p) not in own]}]
    groups += [{"params": clips(model), "weight_decay": 1e-3}] if own else []
    optimizer = torch.optim.SGD(groups, rate, momentum=0.9, weight_decay=5e-4)
    steps = epochs * -(-count // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for x, y in batches(images, count, epochs, seed):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()


def fresh(images: Images, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return ResNet(images.train_images.shape[-1], 10)


def results(images: Images, count: int, epochs: int, seed: int) -> Iterator[tuple[str, float]]:
    """Return the test accuracy of each method in percent."""
    half = epochs // 2
    calibration = [images.train_images[:512]]
    dense = fresh(images, seed)
    train(dense, images, count, half, seed, LEARNING_RATE)
    pretrained = copy.deepcopy(dense)
    train(dense, images, count, half, seed + 100, QAT_RATE)
    yield "dense", evaluate(dense, images)[0]
    (model,) = scheme_a(fresh(images, seed), calibration=calibration)
    train(model, images, count, epochs, seed, LEARNING_RATE)
    yield "scheme A", evaluate(model, images)[0]
    phases = scheme_b(fresh(images, seed), calibration=calibration)
    train(next(phases), images, count, half, seed, LEARNING_RATE)
    model = next(phases)
    train(model, images, count, half, seed + 100, QAT_RATE)
    yield "scheme B", evaluate(model, images)[0]
    for name, quantized in METHODS.items():
        model = quantized(copy.deepcopy(pretrained))
        train(model, images, count, half, seed + 100, QAT_RATE)
        yield name, evaluate(model, images)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "schemes.json")
    options = parser.parse_args()
    images = load_images(None)
    found: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        for name, accuracy in results(images, options.images, options.epochs, seed):
            found.setdefault(name, []).append(accuracy)
            print(seed, name, f"{accuracy:.2f}", flush=True)
    rows = [[name, statistics.mean(values), min(values), max(values)] for name, values in found.items()]
    print(tabulate(rows, headers=["", "accuracy, %", "least", "most"], floatfmt=".2f"))
    options.out.parent.mkdir(exist_ok=True)
    setting = {"images": options.images, "epochs": options.epochs, "data": images.name, "torch": torch.__version__}
    options.out.write_text(json.dumps(setting | {"accuracy": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
