"""A small residual network for small images."""

from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        result: Tensor = self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))
        return result


class ResNet(nn.Module):
    """Stem, three blocks of 16, 32 and 64 channels, linear head: 78 thousand parameters.

    Another `width` than 16 scales all channels.
    """

    def __init__(self, size: int, classes: int, width: int = 16) -> None:
        super().__init__()
        stem = nn.Conv2d(1, width, 3, 2 if size > 16 else 1, 1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())
        blocks = Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
        self.layers = nn.Sequential(*blocks)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(self.stem(x)).mean((2, 3))
        scores: Tensor = self.fc(features)
        return scores


def build() -> ResNet:
    """Return the network for ten classes of images of 28 × 28, untrained."""
    return ResNet(28, 10)
