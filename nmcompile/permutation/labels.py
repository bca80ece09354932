"""Values as the analysis sees them: which channel each element of a tensor belongs to.

A label is an int64 tensor of atoms, one for each element of a value. It is stored compactly: its size is 1 in every
dim along which it is constant. A value has a label for each independent way in which its elements belong to channels:
an activation `(batch, channels, height, width)` has one of shape `(1, channels, 1, 1)`, a weight one for each dim.
Whatever no label tells apart has a fixed place.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Label = Tensor
Shape = tuple[int, ...]
FIXED = "values that do not move with them"
"""The origin of values of which nothing better is known."""


@dataclass(frozen=True)
class Value:
    """A tensor's shape and its labels, each with as many dims as the tensor.

    `origin` says where a value without labels comes from.
    """

    shape: Shape
    labels: tuple[Label, ...] = ()
    origin: str = ""

    def moved(self, move: Callable[[Tensor], Tensor], shape: Shape) -> "Value":
        """Return the value after an operator that only moves elements: the operator acts on labels alike."""
        return Value(shape, tuple(compact(move(label.expand(self.shape))) for label in self.labels))

    def with_dims(self, count: int) -> "Value":
        """Return the value with dims of size 1 in front, as broadcasting adds them."""
        lead = (1,) * (count - len(self.shape))
        labels = tuple(label.reshape(lead + tuple(label.shape)) for label in self.labels)
        return Value(lead + self.shape, labels, self.origin)


def dims_of(label: Label) -> frozenset[int]:
    """Return the dims along which a label varies."""
    return frozenset(dim for dim, size in enumerate(label.shape) if size != 1)


def compact(label: Tensor) -> Label:
    """Return a label with size 1 in every dim along which it is constant."""
    for dim in range(label.dim()):
        first = label.narrow(dim, 0, min(1, label.shape[dim]))
        if label.shape[dim] > 1 and (label.stride(dim) == 0 or bool((label == first).all())):
            label = first
    return label.clone() if label.numel() < label.untyped_storage().size() // label.element_size() else label


def along(vector: Tensor, dim: int, dims: int) -> Label:
    """Return a label that varies along one dim only."""
    return vector.reshape([-1 if one == dim else 1 for one in range(dims)])


def index_along(label: Label, dims: Iterable[int]) -> Tensor:
    """Return a number for each element of a label that tells apart the places along these dims."""
    places = torch.zeros((1,) * label.dim(), dtype=torch.int64)
    for dim in dims:
        places = places * label.shape[dim] + along(torch.arange(label.shape[dim]), dim, label.dim())
    return places.expand(label.shape)
