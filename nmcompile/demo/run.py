"""Train dense and sparse from the same start on the same batches, deploy the sparse model, and show what came of it."""

import copy
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

import nmcompile
from nmcompile.demo.deployment import deploy
from nmcompile.demo.images import Images, load_images
from nmcompile.demo.resnet import ResNet
from nmcompile.demo.training import BATCH, evaluate, train


def run_demo(data: Path | None, epochs: int | None, seed: int, train_images: int) -> bool:
    """Train, compare, verify and deploy; returns whether every pattern held."""
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
    holds = verify_all(sparse, images)
    deploy(dense, sparse, images)
    return holds


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
