"""An architecture of the sweep: a model with random weights, and its inputs for any batch size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Kwargs = dict[str, Any]
Inputs = tuple[tuple[Any, ...], Kwargs]
"""The arguments of one call: those by position, and those by name."""
VOCABULARY = 64


@dataclass(frozen=True)
class Architecture:
    """A model to sweep.

    Args:
        name: unique in the sweep.
        library: where its code comes from, or "by hand".
        make: returns the model; its weights are random.
        inputs: returns the arguments for a batch size.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]


def tensors(*shape: int) -> Callable[[int], Inputs]:
    """Return inputs that are one random tensor, of this shape per sample."""
    return lambda batch: ((torch.randn(batch, *shape),), {})


def images(size: int, channels: int = 3) -> Callable[[int], Inputs]:
    """Return inputs that are square random images."""
    return tensors(channels, size, size)


def tokens(batch: int, length: int = 9) -> Tensor:
    """Return random tokens; the first three of the vocabulary are left to padding, start and end."""
    return torch.randint(3, VOCABULARY - 4, (batch, length))


def token_inputs(length: int = 9) -> Callable[[int], Inputs]:
    """Return inputs that are tokens, by position."""
    return lambda batch: ((tokens(batch, length),), {})
