"""Training of a model on images, and its evaluation."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from nmcompile.demo.images import Images

BATCH = 128
LEARNING_RATE = 0.1


def train(model: nn.Module, images: Images, count: int, epochs: int, seed: int, name: str) -> None:
    """Train with momentum SGD under a one-cycle schedule; `seed` fixes the order of the batches."""
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
    """Return the test accuracy in percent, and the mean loss."""
    model.eval()
    scores = torch.cat([model(x) for x in images.test_images.split(1000)])
    accuracy = (scores.argmax(1) == images.test_labels).float().mean().item()
    return 100 * accuracy, F.cross_entropy(scores, images.test_labels).item()
