"""Constraints of a model on its channels: which move together, and which cannot change places.

An atom is one channel of one tensor. Atoms that must move together form a class; classes that may change places form a
cell. Every permutation within the cells leaves the model's outputs as they are.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nmcompile.permutation.labels import Label, index_along

Ids = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Keys = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]


@dataclass(frozen=True)
class Apart:
    """Atoms with their places in one operator: they may change places only if their classes stand in equal places."""

    ids: Ids
    places: Ids
    reason: str = ""


@dataclass
class Constraints:
    """Everything that the operators of a graph ask, in their order."""

    atoms: int = 0
    together: list[tuple[Ids, Ids]] = field(default_factory=list)
    apart: list[Apart] = field(default_factory=list)
    seen: dict[int, Tensor] = field(default_factory=dict)

    def fresh(self, count: int) -> Tensor:
        """Return new atoms, `(count,)`."""
        self.atoms += count
        return torch.arange(self.atoms - count, self.atoms)

    def unify(self, a: Label, b: Label) -> Label:
        """Let the atoms of two labels move together, element by element after broadcasting, and return one of them."""
        if a is not b and not torch.equal(a, b):
            self.together.append(tuple(one.numpy().ravel() for one in torch.broadcast_tensors(a, b)))
        return a

    def use(self, label: Label) -> None:
        """Note that an operator acts on these atoms: others are not like them."""
        if id(label) not in self.seen:
            self.seen[id(label)] = label  # which also keeps the id from being used again
            self.separate(label, (), "")

    def separate(self, label: Label, dims: Collection[int], reason: str) -> None:
        """Let no atoms change places that differ in their index along these dims."""
        ids, places = label.numpy().ravel(), index_along(label, sorted(dims)).numpy().ravel()
        self.apart.append(Apart(ids, places, reason))


def find_classes(constraints: Constraints) -> Ids:
    """Return the class of each atom: the lowest atom that moves together with it."""
    root = np.arange(constraints.atoms)
    pairs = [np.concatenate(side) for side in zip(*constraints.together, strict=True)]
    if not pairs:
        return root
    while True:
        a, b = root[pairs[0]], root[pairs[1]]
        differ = a != b
        if not differ.any():
            return root
        low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
        np.minimum.at(root, high, low)
        while not np.array_equal(root, root[root]):
            root = root[root]


def find_cells(classes: Ids, apart: Sequence[Apart]) -> list[Ids]:
    """Return the cells of more than one class, each the ascending classes in it.

    The key of a class is a sum of random 64-bit numbers, one for each place in which it stands.
    """
    keys: Keys = np.zeros(len(classes), dtype=np.uint64)
    for number, one in enumerate(apart):
        np.add.at(keys, classes[one.ids], _mixed(_mixed(np.full(1, number + 1)) + one.places.astype(np.uint64)))
    roots = np.unique(classes)
    order = np.argsort(keys[roots], kind="stable")
    in_order = keys[roots[order]]
    starts = np.flatnonzero(in_order[1:] != in_order[:-1]) + 1
    return [np.sort(cell) for cell in np.split(roots[order], starts) if len(cell) > 1]


def _mixed(numbers: Ids | Keys) -> Keys:
    """Return SplitMix64 of each number."""
    z = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
