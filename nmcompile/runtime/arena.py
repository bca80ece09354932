"""The memory of a program's images: one block, in which images that are not needed at the same time may overlap."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nmcompile.runtime.steps import Image, Step, Sums

ALIGNED = 64
SLACK = 64  # bytes behind an image that kernels may touch


@dataclass(frozen=True)
class Place:
    """Where an image lies: bytes from the start of the arena, of its halo's first pixel.

    Args:
        halo: pixels around each sample on each side.
        fill: the code that the halo holds.
        stride: bytes from a pixel to the next.
    """

    offset: int
    halo: int
    fill: int
    stride: int


@dataclass(frozen=True)
class Arena:
    """A plan of the memory.

    Args:
        bytes: of the block.
        places: by image; that of a slice lies in the place of its whole.
    """

    bytes: int
    places: Mapping[Image, Place]


def plan_arena(steps: Sequence[Step]) -> Arena:
    """Place each image at the lowest offset that is free from its first writer to its last reader."""
    halos, lives = dict(_halos(steps)), _lives(steps)
    places: dict[Image, Place] = {}
    placed: list[tuple[int, int, Image]] = []
    for image, live in lives.items():
        halo, fill = halos.get(image, (0, 0))
        size = -(-(_bytes(image, halo) + SLACK) // ALIGNED) * ALIGNED
        taken = sorted((start, end) for start, end, other in placed if _meet(live, lives[other]))
        offset = _lowest_gap(taken, size)
        placed.append((offset, offset + size, image))
        places[image] = Place(offset, halo, fill, image.channels)
    for image in _slices(steps):
        whole = places[image.memory]
        places[image] = Place(whole.offset + image.first, whole.halo, whole.fill, whole.stride)
    return Arena(max((end for _, end, _ in placed), default=0), places)


def _bytes(image: Image, halo: int) -> int:
    return image.samples * (image.height + 2 * halo) * (image.width + 2 * halo) * image.channels


def _halos(steps: Sequence[Step]) -> Iterator[tuple[Image, tuple[int, int]]]:
    """Yield the images that layers read, with the largest padding and the code of zero."""
    widest: dict[Image, int] = {}
    for step in steps:
        if isinstance(step, Sums):
            image = step.input.memory
            widest[image] = max(widest.get(image, 0), *step.window.padding)
            yield image, (widest[image], step.zero)


def _lives(steps: Sequence[Step]) -> dict[Image, tuple[int, int]]:
    """Return the numbers of the first and of the last step that touch an image's memory."""
    lives: dict[Image, tuple[int, int]] = {}
    for number, step in enumerate(steps):
        for one in (*step.read, step.written):
            if isinstance(one, Image):
                first, _ = lives.get(one.memory, (number, number))
                lives[one.memory] = first, number
    return lives


def _meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _lowest_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Return the start of the first gap of that size between sorted intervals, which may overlap."""
    offset = 0
    for start, end in taken:
        if start - offset >= size:
            return offset
        offset = max(offset, end)
    return offset


def _slices(steps: Sequence[Step]) -> Iterator[Image]:
    for step in steps:
        yield from (one for one in (*step.read, step.written) if isinstance(one, Image) and one.whole is not None)
