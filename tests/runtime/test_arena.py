"""The memory plan: images that live at the same time never overlap, and memory is used again."""

from itertools import combinations

import pytest
import torch

from nmcompile.runtime.arena import SLACK, plan_arena
from nmcompile.runtime.steps import Add, Image, MaxPool, Recode, Step, Window


def random_steps(seed: int, count: int) -> list[Step]:
    """Return steps, each of which reads what earlier ones wrote, some into slices of a whole."""
    generator = torch.Generator().manual_seed(seed)

    def pick(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    images, steps = [Image(1, 8, 8, 8)], list[Step]()
    for _ in range(count):
        source = images[pick(len(images))]
        kind = pick(4)
        if kind == 0:
            output = Image(*source.shape)
            steps.append(Add(source, images[pick(len(images))], output, 0, 0, 255))
        elif kind == 1:
            output = Image(1 + pick(2), 1 + pick(9), 1 + pick(9), 8)
            steps.append(MaxPool(source, output, Window()))
        elif kind == 2:
            output = Image(*source.shape)
            steps.append(Recode(source, output))
        else:
            output = Image(*source.shape[:3], 16)
            steps += [Recode(source, Image(*source.shape[:3], 8, output, first)) for first in (0, 8)]
        images.append(output)
    return steps


def lives(steps: list[Step], image: Image) -> set[int]:
    """Return the numbers of the steps during which an image has to stay as it is."""
    touched = [
        number
        for number, step in enumerate(steps)
        for one in (*step.read, step.written)
        if isinstance(one, Image) and one.memory is image
    ]
    return set(range(min(touched), max(touched) + 1))


@pytest.mark.parametrize("seed", range(20))
def test_live_images_do_not_overlap(seed: int) -> None:
    steps = random_steps(seed, 40)
    arena = plan_arena(steps)
    owners = [image for image in arena.places if image.whole is None]
    bytes_of = {}
    for image in owners:
        place, size = arena.places[image], torch.Size(image.shape).numel()
        assert place.offset % 64 == 0 and place.stride == image.channels and place.halo == 0
        bytes_of[image] = range(place.offset, place.offset + size + SLACK)
        assert bytes_of[image].stop <= arena.bytes
    for one, other in combinations(owners, 2):
        if lives(steps, one) & lives(steps, other):
            assert not set(bytes_of[one]) & set(bytes_of[other])
    assert arena.bytes < sum(map(len, bytes_of.values()))


def test_slices_lie_in_their_whole() -> None:
    whole = Image(1, 2, 2, 16)
    parts = [Image(1, 2, 2, 8, whole, first) for first in (0, 8)]
    source = Image(1, 2, 2, 8)
    arena = plan_arena([*(Recode(source, part) for part in parts), Recode(whole, Image(1, 2, 2, 16))])
    place = arena.places[whole]
    assert [arena.places[part].offset - place.offset for part in parts] == [0, 8]
    assert {arena.places[part].stride for part in parts} == {16}
