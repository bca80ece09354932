"""Train a model of timm with timm's own optimizer, schedule, loss and average of weights.

python examples/train_timm.py --model resnet18 --epochs 10
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile


def digits(size: int) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits as RGB images, `(1797, 3, size, size)`, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return F.interpolate(images, size=(size, size)).expand(-1, 3, -1, -1), torch.tensor(labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return (torch.cat([model(part) for part in images.split(100)]).argmax(1) == labels).float().mean().item()


def main(name: str, epochs: int, size: int, count: int) -> None:
    torch.manual_seed(0)
    images, labels = digits(size)
    model = timm.create_model(name, num_classes=10)
    model = nmcompile.compile(model, mode="training", args=(images[:2],))
    print(nmcompile.analyze(model, mode="training", args=(images[:2],)))

    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=1, warmup_lr_init=1e-4)
    average, loss_of = ModelEmaV3(model, decay=0.9), LabelSmoothingCrossEntropy(0.1)
    for epoch in range(epochs):
        schedule.step(epoch)
        model.train()
        for batch in torch.randperm(count).split(50):
            loss = loss_of(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
        print(f"epoch {epoch}: loss {loss.item():.3f}")

    test = slice(1500, None)
    print(f"accuracy {accuracy(model, images[test], labels[test]):.1%}")
    final = nmcompile.finalize(average.module)  # under the masks of the model, which its weights were trained with
    print(f"accuracy of the average, finalized {accuracy(final, images[test], labels[test]):.1%}")
    print("every block holds:", nmcompile.verify(final).ok)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="test_resnet", help="any of timm.list_models()")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--images", type=int, default=1500, help="to train on, 1500 at most")
    options = parser.parse_args()
    main(options.model, options.epochs, options.size, options.images)
