"""The networks: small ones for a CPU, and the paper's from torchvision."""

from collections.abc import Callable, Mapping
from itertools import chain, pairwise
from types import ModuleType

import torch
from torch import Tensor, nn

from nmcompile.demo.resnet import ResNet
from nmcompile.errors import ConfigError, nearest
from nmcompile.paper.language_model import CharacterModel

Build = Callable[[Tensor, int], nn.Module]
"""(a batch of inputs, classes) -> a fresh network, from torch's default generator."""


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, the middle one in groups: the block of ResNet-50 and ResNeXt."""

    def __init__(self, inputs: int, outputs: int, width: int, groups: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return result


def bottlenecks(x: Tensor, classes: int, groups: int) -> nn.Module:
    """Return three bottleneck blocks between a stem and a head; with groups they are twice as wide, as in ResNeXt."""
    factor = 2 if groups > 1 else 1
    blocks = (
        Bottleneck(16, 32, factor * 8, groups, 1),
        Bottleneck(32, 64, factor * 16, groups, 2),
        Bottleneck(64, 128, factor * 32, groups, 2),
    )
    stem = (nn.Conv2d(x.shape[1], 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


class Basic(nn.Module):
    """Two 3x3 convolutions around a shortcut, all with batch norm: the block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        changes = stride > 1 or inputs != outputs
        shortcut = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)) if changes else ()
        self.shortcut = nn.Sequential(*shortcut)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return result


def cifar_resnet18(x: Tensor, classes: int) -> nn.Module:
    """Return ResNet-18 with the stem for small images."""
    widths = (64, 64, 128, 256, 512)
    pairs = ((Basic(a, b, 1 + (a != b)), Basic(b, b, 1)) for a, b in pairwise(widths))
    stem = (nn.Conv2d(x.shape[1], 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(*stem, *chain(*pairs), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def small(x: Tensor, classes: int) -> nn.Module:
    return ResNet(x.shape[-1], classes)


def from_torchvision(name: str) -> Build:
    """Return a builder of torchvision's network."""

    def build(x: Tensor, classes: int) -> nn.Module:
        model: nn.Module = getattr(_torchvision_models(), name)(num_classes=classes)
        return model

    return build


def _torchvision_models() -> ModuleType:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: a wheel for another torch
        raise ConfigError(f"the paper's networks come from torchvision, which is not usable here ({error})") from error
    found: ModuleType = models
    return found


NETWORKS: Mapping[str, Build] = {
    "small": small,
    "small-bottleneck": lambda x, classes: bottlenecks(x, classes, 1),
    "small-resnext": lambda x, classes: bottlenecks(x, classes, 4),
    "transformer": lambda x, characters: CharacterModel(x.shape[1], characters),
    "resnet18-cifar": cifar_resnet18,
    "resnet18": from_torchvision("resnet18"),
    "resnet50": from_torchvision("resnet50"),
    "resnext50": from_torchvision("resnext50_32x4d"),
}


def build_network(name: str, x: Tensor, classes: int, seed: int) -> nn.Module:
    """Return a fresh network for inputs like `x`; rows with the same seed start from the same weights."""
    if name not in NETWORKS:
        raise ConfigError(f"there is no network {name!r}; {nearest(name, NETWORKS)}")
    torch.manual_seed(seed)
    return NETWORKS[name](x, classes)
