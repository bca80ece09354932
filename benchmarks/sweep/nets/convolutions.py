"""Networks of convolutions: U-Nets, detection, segmentation, audio, point clouds."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Return a 3x3 convolution with norm and ReLU."""
    conv = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU())


class UNet(nn.Module):
    """A U-Net (arXiv 1505.04597) of two levels; the way up is upsampling, or transposed convolutions."""

    def __init__(self, width: int = 16, transposed: bool = False) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(3, width), block(width, 2 * width, 2), block(2 * width, 4 * width, 2)])
        ups = [(4 * width, 2 * width), (2 * width, width)]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 2, 2) if transposed else nn.Sequential(nn.Upsample(scale_factor=2), block(i, o))
            for i, o in ups
        )
        self.join = nn.ModuleList([block(2 * o, o) for _, o in ups])
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            skips.append(x := down(x))
        skips.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), skips.pop()], 1))
        result: Tensor = self.head(x)
        return result


class UNet3d(nn.Module):
    """A U-Net of volumes (arXiv 1606.06650) of one level."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, width, 3, padding=1)
        self.down = nn.Conv3d(width, 2 * width, 3, 2, 1)
        self.middle = nn.Conv3d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.Conv3d(3 * width, width, 3, padding=1)
        self.head = nn.Conv3d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x).relu()
        x = self.middle(self.down(skip).relu()).relu()
        x = F.interpolate(x, scale_factor=2.0)
        result: Tensor = self.head(self.up(torch.cat([x, skip], 1)).relu())
        return result


class Detector(nn.Module):
    """A one-stage detector with a feature pyramid (arXiv 1612.03144) and shared heads (FCOS, arXiv 1904.01355)."""

    def __init__(self, width: int = 16, classes: int = 8) -> None:
        super().__init__()
        self.stages = nn.ModuleList([block(3, width, 2), block(width, 2 * width, 2), block(2 * width, 4 * width, 2)])
        self.lateral = nn.ModuleList([nn.Conv2d(width * 2**i, width, 1) for i in range(3)])
        self.tower = nn.Sequential(block(width, width), block(width, width))
        self.classes = nn.Conv2d(width, classes, 3, padding=1)
        self.boxes = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            features.append(lateral(x))
        for level in (1, 0):
            features[level] = features[level] + F.interpolate(features[level + 1], scale_factor=2.0)
        towers = [self.tower(feature) for feature in features]
        classes = torch.cat([self.classes(tower).flatten(2) for tower in towers], 2)
        return classes, torch.cat([self.boxes(tower).flatten(2).exp() for tower in towers], 2)


class Pyramid(nn.Module):
    """Segmentation with atrous convolutions at several rates and a pooled branch (DeepLabv3, arXiv 1706.05587)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, width, 2), block(width, 2 * width, 2))
        self.rates = nn.ModuleList([nn.Conv2d(2 * width, width, 3, padding=r, dilation=r) for r in (1, 2, 4)])
        self.pooled = nn.Conv2d(2 * width, width, 1)
        self.project = nn.Conv2d(4 * width, width, 1)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, h = x.shape[-2:], self.body(x)
        pooled = self.pooled(h.mean((2, 3), keepdim=True)).expand(-1, -1, *h.shape[-2:])
        h = self.project(torch.cat([*(rate(h) for rate in self.rates), pooled], 1).relu()).relu()
        return F.interpolate(self.head(h), size=size, mode="bilinear", align_corners=False)


class SuperResolution(nn.Module):
    """Sub-pixel convolution with residual blocks (EDSR, arXiv 1707.02921)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Sequential(block(width, width), block(width, width)) for _ in range(2)])
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for one in self.blocks:
            x = x + one(x)
        result: Tensor = self.last(self.up(x))
        return result


class WaveNet(nn.Module):
    """Gated causal convolutions of growing dilation over a waveform (arXiv 1609.03499)."""

    def __init__(self, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.gated = nn.ModuleList([nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(layers)])
        self.mixed = nn.ModuleList([nn.Conv1d(width, width, 1) for _ in range(layers)])
        self.last = nn.Conv1d(width, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, (gated, mixed) in enumerate(zip(self.gated, self.mixed, strict=True)):
            value, gate = gated(F.pad(x, (2**i, 0))).chunk(2, 1)
            x = x + mixed(value.tanh() * gate.sigmoid())
        result: Tensor = self.last(x.relu())
        return result


class KeywordSpotter(nn.Module):
    """Depthwise separable convolutions over a spectrogram (arXiv 1711.07128)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = block(1, width, 2)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(width, width, 3, padding=1, groups=width), nn.ReLU(), nn.Conv2d(width, width, 1)
                )
                for _ in range(2)
            )
        )
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(self.first(x)).relu().mean((2, 3)))
        return result


class Vocoder(nn.Module):
    """A generator of waveforms from spectrograms by transposed convolutions (HiFi-GAN, arXiv 2010.05646)."""

    def __init__(self, mels: int = 16, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv1d(mels, width, 7, padding=3)
        self.up = nn.ModuleList([nn.ConvTranspose1d(width // 2**i, width // 2 ** (i + 1), 4, 2, 1) for i in range(2)])
        self.mixed = nn.ModuleList([nn.Conv1d(width // 2 ** (i + 1), width // 2 ** (i + 1), 3, 1, 1) for i in range(2)])
        self.last = nn.Conv1d(width // 4, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up, mixed in zip(self.up, self.mixed, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            x = x + mixed(F.leaky_relu(x, 0.1))
        return torch.tanh(self.last(x))


class PointNet(nn.Module):
    """Shared layers over the points of a cloud and their maximum (arXiv 1612.00593)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.points = nn.ModuleList(
            [nn.Conv1d(3, width, 1), nn.Conv1d(width, width, 1), nn.Conv1d(width, 2 * width, 1)]
        )
        self.whole = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.points:
            x = layer(x).relu()
        result: Tensor = self.head(self.whole(x.amax(2)).relu())
        return result


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized in each call (arXiv 1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


def standardized(width: int = 16) -> nn.Module:
    """Return a network of convolutions with weights that are computed in each call, each in another way."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(),
        Standardized(width, width, 3, padding=1), nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(width, width, 3, padding=1)), nn.ReLU(),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(width, width, 3, padding=1)), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 8),
    )  # fmt: skip
