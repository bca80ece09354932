"""Data sets: IDX folders such as Fashion-MNIST, CIFAR-10, folders of images such as ImageNet, and text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nmcompile.demo.images import load_images
from nmcompile.errors import ConfigError
from nmcompile.files.read_files import read_regular

Batch = tuple[Tensor, Tensor]
CIFAR_FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
CIFAR_RECORD = 1 + 3 * 32 * 32
LARGEST = 2**28  # bytes of a CIFAR-10 file
PADDING = 4  # pixels around an image of which a crop is taken


class Source(Protocol):
    """Samples by number."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def batches(self, orders: Sequence[Tensor], seed: int) -> Iterator[Batch]:
        """Yield the inputs and labels of each batch.

        Args:
            orders: the numbers of the samples of each batch, int64.
            seed: decides on random crops.
        """


@dataclass(frozen=True)
class Data:
    """A data set: samples for training and for test, the number of classes, and the shape of an input."""

    name: str
    train: Source
    test: Source
    classes: int

    def first(self, count: int, batch: int) -> list[Tensor]:
        """Return the inputs of the first samples in batches, for calibration and tracing."""
        orders = torch.arange(min(count, len(self.train))).split(batch)
        return [x for x, _ in self.train.batches(orders, 0)]


@dataclass(frozen=True)
class TensorSource:
    """Samples in memory; with `crops`, images are shifted by up to four pixels and mirrored at random."""

    x: Tensor
    y: Tensor
    crops: bool = False

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, orders: Sequence[Tensor], seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for order in orders:
            x = self.x[order]
            yield (_crop(x, generator) if self.crops else x), self.y[order]


def _crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift and mirror each image at random."""
    height, width = x.shape[2:]
    padded = F.pad(x, (PADDING,) * 4)
    down, right = torch.randint(2 * PADDING + 1, (2, len(x), 1), generator=generator)
    rows, columns = torch.arange(height) + down, torch.arange(width) + right
    mirrored = torch.rand(len(x), 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    samples = torch.arange(len(x))[:, None, None]
    return padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def load_data(name: str, folder: Path | None) -> Data:
    """Load a data set.

    Args:
        name: what the experiment wants: `"images"` (Fashion-MNIST, if no folder is given), `"imagenet"`, `"text"`.
        folder: the user's data; its files decide what it is: `data_batch_1.bin` (CIFAR-10, the binary version),
            `train/` and `val/` (a folder for each class), a text file, or the four IDX files.

    Raises:
        ConfigError: there is no such data.
    """
    if name == "text":
        from nmcompile.paper.text import load_text

        return load_text(folder)
    if folder is not None and (folder / CIFAR_FILES[0]).exists():
        return _cifar(folder)
    if folder is not None and (folder / "train").is_dir():
        from nmcompile.paper.image_folder import load_image_folder

        return load_image_folder(folder)
    if folder is None and name == "imagenet":
        raise ConfigError("--scale full trains on ImageNet or CIFAR-10, which is not installed: give --data DIR")
    images = load_images(folder)
    train = TensorSource(images.train_images, images.train_labels)
    classes = int(images.train_labels.max()) + 1
    return Data(images.name, train, TensorSource(images.test_images, images.test_labels), classes)


def _cifar(folder: Path) -> Data:
    """Load CIFAR-10's binary version, standardized by channel, with random crops for training."""
    parts = [_read_cifar(folder / name) for name in CIFAR_FILES]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    test = len(parts[-1][0])
    std, mean = torch.std_mean(images[:-test], dim=(0, 2, 3), keepdim=True)
    images = (images - mean) / std
    train = TensorSource(images[:-test], labels[:-test], crops=True)
    return Data("CIFAR-10", train, TensorSource(images[-test:], labels[-test:]), 10)


def _read_cifar(path: Path) -> Batch:
    content = read_regular(path, LARGEST)
    if not content or len(content) % CIFAR_RECORD:
        raise ConfigError(f"{path} is not of CIFAR-10's binary version: records have {CIFAR_RECORD} bytes")
    records = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).reshape(-1, CIFAR_RECORD).copy())
    if records[:, 0].max() > 9:
        raise ConfigError(f"{path} is not of CIFAR-10's binary version: a label is above 9")
    return records[:, 1:].reshape(-1, 3, 32, 32).float(), records[:, 0].long()


def orders_of_epoch(count: int, batch: int, seed: int, epoch: int) -> list[Tensor]:
    """Return the batches of an epoch as numbers of samples: the same for every row of an experiment."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return list(torch.randperm(count, generator=generator).split(batch))


def every(items: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
    """Return the batches of one of several processes."""
    return list(islice(items, rank, None, size))
