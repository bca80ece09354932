"""Permutations written into tensors, so that nothing is permuted at run time."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nmcompile.permutation.constraints import Ids

Moves = Ids
"""An order of channels: for each class, the class that comes to its places."""


def fold(tensor: Tensor, axes: Mapping[int, Ids], moves: Moves) -> Tensor:
    """Return a tensor with its channels moved; the tensor itself if none of them moves.

    Args:
        tensor: a parameter or a buffer.
        axes: by dim along which elements move, the class of each element, in a shape that broadcasts to the tensor's.
        moves: by class, the class that comes to its places.
    """
    for dim, ids in axes.items():
        if not np.array_equal(moves[ids], ids):
            tensor = _taken(tensor, torch.from_numpy(_sources(ids, dim, moves)), dim)
    return tensor


def _sources(ids: Ids, dim: int, moves: Moves) -> Ids:
    """Return the position from which the new content of each element comes.

    The n-th element of a class takes the n-th element of the class that comes to its places.
    """
    classes, inverse, first = first_positions(ids, dim)
    return positions(ids, dim) - first[inverse] + first[np.searchsorted(classes, moves[ids])]


def positions(ids: Ids, dim: int) -> Ids:
    """Return the position of each element along a dim."""
    return np.broadcast_to(
        np.arange(ids.shape[dim]).reshape([-1 if d == dim else 1 for d in range(ids.ndim)]), ids.shape
    )


def first_positions(ids: Ids, dim: int) -> tuple[Ids, Ids, Ids]:
    """Return the classes of an axis, the index into them of each element, and the lowest position of each class."""
    classes, inverse = np.unique(ids, return_inverse=True)
    first = np.full(len(classes), ids.shape[dim])
    np.minimum.at(first, inverse.ravel(), positions(ids, dim).ravel())
    return classes, inverse.reshape(ids.shape), first


def _taken(tensor: Tensor, source: Tensor, dim: int) -> Tensor:
    source = source.to(tensor.device)
    if source.numel() == source.shape[dim]:
        return tensor.index_select(dim, source.ravel())
    return torch.take_along_dim(tensor, source, dim)
