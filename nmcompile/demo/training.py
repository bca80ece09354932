"""Train dense and sparse from the same start on the same batches, and show what came of it."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import nmcompile
from nmcompile.demo.images import Images, load_images
from nmcompile.demo.resnet import ResNet

BATCH = 128
LEARNING_RATE = 0.1


def run_demo(data: Path | None, epochs: int | None, seed: int, train_images: int) -> bool:
    """Train, compare and verify; returns whether every pattern held."""
    images = load_images(data)
    count = min(train_images, len(images.train_images))
    epochs = epochs or (30 if count < 5000 else 4)
    print(f"images: {images.name}, {count} for training, {len(images.test_images)} for test, {epochs} epochs\n")
    torch.manual_seed(seed)
    dense = ResNet(images.train_images.shape[-1], int(images.train_labels.max()) + 1)
    sparse = nmcompile.compile(copy.deepcopy(dense), mode="training", args=(images.test_images[:1],))
    results = []
    for name, model in (("dense", dense), ("sparse", sparse)):
        train(model, images, count, epochs, seed, name)
        results.append(evaluate(model, images))
    difference = [after - before for before, after in zip(*results, strict=True)]
    rows = [["dense", *results[0]], ["sparse", *results[1]], ["difference", *difference]]
    print(tabulate(rows, headers=["", "test accuracy, %", "test loss"], floatfmt=("", ".2f", ".4f")), "\n")
    print(nmcompile.inspect(sparse), "\n")
    return verify_all(sparse, images)


def train(model: nn.Module, images: Images, count: int, epochs: int, seed: int, name: str) -> None:
    """SGD with momentum under a one-cycle schedule; `seed` fixes the order of the batches."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    steps = epochs * -(-count // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc=f"training {name}", unit="step", disable=None) as bar:
        for x, y in batches(images, count, epochs, seed):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            bar.update()


def batches(images: Images, count: int, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(count, generator=generator).split(BATCH):
            yield images.train_images[chosen], images.train_labels[chosen]


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Test accuracy in percent, and mean loss."""
    model.eval()
    scores = torch.cat([model(x) for x in images.test_images.split(1000)])
    accuracy = (scores.argmax(1) == images.test_labels).float().mean().item()
    return 100 * accuracy, F.cross_entropy(scores, images.test_labels).item()


def verify_all(sparse: nn.Module, images: Images) -> bool:
    """Check every pruned operand of one training step, then the finalized weights."""
    x, y = images.train_images[:BATCH], images.train_labels[:BATCH]
    sparse.train()
    # A copy: the step must not move the batch statistics that were just evaluated.
    probe = copy.deepcopy(sparse)
    step = nmcompile.verify(probe, step=lambda: F.cross_entropy(probe(x), y).backward())
    print("operands of the GEMMs of one training step:\n", step, "\n", sep="")
    weights = nmcompile.verify(nmcompile.finalize(sparse))
    print("weights after finalize:\n", weights, sep="")
    return step.ok and weights.ok
