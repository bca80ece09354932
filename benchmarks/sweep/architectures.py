"""All architectures of the sweep, in the order of its table."""

from benchmarks.sweep.architecture import Architecture
from benchmarks.sweep.by_hand import BY_HAND
from benchmarks.sweep.language import LANGUAGE
from benchmarks.sweep.perception import PERCEPTION
from benchmarks.sweep.vision_libraries import TIMM, TORCHVISION

ARCHITECTURES: tuple[Architecture, ...] = (*BY_HAND, *TORCHVISION, *TIMM, *LANGUAGE, *PERCEPTION)


def named(name: str) -> Architecture:
    """Return the architecture of this name."""
    return next(one for one in ARCHITECTURES if one.name == name)
