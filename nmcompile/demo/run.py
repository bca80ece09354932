"""Train dense and sparse from the same weights on the same batches, deploy the sparse model, and show the results."""

import copy
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import nmcompile
from nmcompile.api.verify import VerifyReport
from nmcompile.config import Phase
from nmcompile.demo.deployment import deploy
from nmcompile.demo.images import Images, load_images
from nmcompile.demo.resnet import ResNet
from nmcompile.demo.steps import step_times
from nmcompile.demo.training import BATCH, evaluate, train
from nmcompile.printable import table
from nmcompile.report.layers import OPERANDS, LayerReport
from nmcompile.report.report import Report


def run_demo(data: Path | None, epochs: int | None, seed: int, train_images: int) -> bool:
    """Train, compare, verify and deploy; return whether every pattern held."""
    images = load_images(data)
    count = min(train_images, len(images.train_images))
    epochs = epochs or (30 if count < 5000 else 4)
    print(f"images: {images.name}, {count} for training, {len(images.test_images)} for test, {epochs} epochs\n")
    torch.manual_seed(seed)
    dense = ResNet(images.train_images.shape[-1], int(images.train_labels.max()) + 1)
    sparse = nmcompile.compile(copy.deepcopy(dense), mode="training", args=(images.train_images[:BATCH],))
    results = []
    for name, model in (("dense", dense), ("sparse", sparse)):
        train(model, images, count, epochs, seed, name)
        results.append(evaluate(model, images))
    difference = [after - before for before, after in zip(*results, strict=True)]
    rows = [["dense", *results[0]], ["sparse", *results[1]], ["difference", *difference]]
    print(table(rows, ["trained", "test accuracy, %", "test loss"], floatfmt=("", ".2f", ".4f")), "\n")
    print(step_times(dense, sparse, images), "\n")
    print(layers_table(nmcompile.inspect(sparse)), "\n")
    checks = verify_all(sparse, images)
    print(*(summary(name, report) for name, report in checks.items()), "", sep="\n")
    print(deploy(dense, sparse, images))
    return all(report.ok for report in checks.values())


def layers_table(report: Report) -> str:
    """Return a table of what is pruned per layer and phase, and the sparse kernel's speed; `inspect` has reasons."""
    rows = [[layer.name, *(_pruned(layer, phase) for phase in Phase)] for layer in report.layers]
    shown = table(rows, ["pruned (sparse kernel against dense)", *(phase.value for phase in Phase)])
    more = "print(nmcompile.inspect(model).full())"
    return f"{shown}\nThe faster kernel runs. More of each layer, with the reasons: {more}."


def _pruned(layer: LayerReport, phase: Phase) -> str:
    rows = layer.plan.rows_of(phase)
    patterns = [f"{OPERANDS[row.operand]} {row.pattern}" for row in rows if row.operand and row.pattern]
    choice = layer.choices.get(phase)
    speed = f" ({choice.speedup:.2f}x)" if choice is not None and choice.speedup is not None else ""
    return ", ".join(patterns) + speed if patterns else "dense"


def summary(name: str, report: VerifyReport) -> str:
    """Summarize the checked blocks, and list the checks that fail."""
    broken = VerifyReport(tuple(check for check in report.checks if check.violations))
    blocks = sum(check.blocks for check in report.checks)
    counted = f"{name}: {blocks:,} blocks in {len(report.checks)} checks"
    return f"{counted}, every block holds" if report.ok else f"{counted}\n{broken}"


def verify_all(sparse: nn.Module, images: Images) -> dict[str, VerifyReport]:
    """Check every pruned operand of one training step, then the finalized weights."""
    x, y = images.train_images[:BATCH], images.train_labels[:BATCH]
    sparse.train()
    # Run the step on a copy: it must not move the batch statistics that were just evaluated.
    probe = copy.deepcopy(sparse)
    step = nmcompile.verify(probe, step=lambda: F.cross_entropy(probe(x), y).backward())
    weights = nmcompile.verify(nmcompile.finalize(sparse))
    return {"operands of the GEMMs of a training step": step, "weights after finalize": weights}
