"""Images in a folder for each class, as ImageNet is unpacked: the standard preprocessing, by torchvision."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nmcompile.errors import ConfigError
from nmcompile.paper.data import Batch, Data

SIZE = 224
RESIZED = 256
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WORKERS = 8


class SeededImages(Dataset[tuple[Tensor, int]]):
    """Images whose random crops depend on a seed and the image alone, however many processes read them."""

    def __init__(self, images: "Dataset[tuple[Tensor, int]]", seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, index)))
            return self.images[index]


@dataclass(frozen=True)
class FolderSource:
    """Images that worker processes read and crop; with 0 workers, this process."""

    images: "Dataset[tuple[Tensor, int]]"
    count: int
    workers: int

    def __len__(self) -> int:
        return self.count

    def batches(self, orders: Sequence[Tensor], seed: int) -> Iterator[Batch]:
        """Yield the images and labels of each batch."""
        sampler = [order.tolist() for order in orders]
        workers = min(self.workers, len(sampler))
        yield from DataLoader(SeededImages(self.images, seed), batch_sampler=sampler, num_workers=workers)


def load_image_folder(folder: Path, size: int = SIZE, workers: int = WORKERS) -> Data:
    """Load `train/` and `val/`: random crops and mirrors for training, the middle for the test.

    Raises:
        ConfigError: there is no torchvision, or no image in a folder.
    """
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"folders of images are read by torchvision, which is not usable here ({error})") from error
    ends = [transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    crops = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    middle = [transforms.Resize(size * RESIZED // SIZE), transforms.CenterCrop(size)]
    try:
        train = ImageFolder(str(folder / "train"), transforms.Compose([*crops, *ends]))
        test = ImageFolder(str(folder / "val"), transforms.Compose([*middle, *ends]))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} is not a folder of images like ImageNet: {error}") from error
    sources = [FolderSource(images, len(images), workers) for images in (train, test)]
    return Data(f"{folder.name}, {size} pixels", sources[0], sources[1], len(train.classes))
