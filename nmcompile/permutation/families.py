"""Families: the axes of a model's tensors that must be permuted together, and why others keep their order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nmcompile.ir.captured import Captured, WholeGraph
from nmcompile.permutation.constraints import Apart, Ids, find_cells, find_classes
from nmcompile.permutation.fold import first_positions, positions
from nmcompile.permutation.labels import Label
from nmcompile.permutation.trace import Axes, trace

NO_GRAPH = "the whole graph of the model is not known; pass args="
LISTED = 3


@dataclass(frozen=True)
class Family:
    """Cells that lie on the same axes, such as the heads of one attention.

    Args:
        axes: the name and the dim of each tensor whose elements move.
        cells: by cell, its classes; those of a cell may take each other's places.
    """

    axes: tuple[tuple[str, int], ...]
    cells: tuple[Ids, ...]

    def __str__(self) -> str:
        sizes = " + ".join(str(len(cell)) for cell in self.cells)
        return f"{sizes} channels of " + ", ".join(f"{name} (dim {dim})" for name, dim in self.axes)


@dataclass(frozen=True)
class Channels:
    """All channels of a model.

    Args:
        classes: by atom, the class that moves together.
        families: the classes that may change places.
        axes: the label of each axis.
        apart: why atoms may not change places.
    """

    classes: Ids
    families: tuple[Family, ...]
    axes: Axes
    apart: tuple[Apart, ...]

    def classes_of(self, label: Label) -> Ids:
        """Return the class of each element of a label."""
        found: Ids = self.classes[label.numpy()]
        return found

    def reason(self, label: Label) -> str:
        """Return why the channels of a label keep their places; "" if some may move."""
        mine = np.unique(self.classes_of(label))
        if any(np.isin(cell, mine).any() for family in self.families for cell in family.cells):
            return ""
        given = (one.reason for one in self.apart if one.reason and np.isin(self.classes[one.ids], mine).any())
        return next(given, "they are alone")


def find_families(captured: Captured, tensors: Mapping[str, Tensor]) -> Channels | str:
    """Return the channels of a captured model whose parameters and persistent buffers are `tensors`.

    A reason is returned in place of them if nothing may move.
    """
    whole = captured.whole
    if whole is None or whole.source != "export":
        return captured.whole_reason or NO_GRAPH
    if unreached := list(_unreached(whole, tensors)):
        return (
            f"the example does not reach {', '.join(unreached[:LISTED])}{', ...' if len(unreached) > LISTED else ''}, "
            "whose channels may have to move too; pass args= that reach them, or remove them"
        )
    constraints, axes = trace(whole, tensors)
    classes = find_classes(constraints)
    apart = (*constraints.apart, *_offsets(classes, axes))
    cells = find_cells(classes, apart)
    return Channels(classes, tuple(_families(cells, classes, axes)), axes, apart)


def _unreached(whole: WholeGraph, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the tensors of which the graph knows nothing: code that it does not show may read them."""
    nodes = [node for node in whole.graph.nodes if node.op == "placeholder" and node.users]
    names = (whole.constants.get(node.name, "") for node in nodes)
    used = {id(tensors[name]) for name in names if name in tensors}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() > 1 and id(tensor) not in used:
            yield name


def _offsets(classes: Ids, axes: Axes) -> Iterator[Apart]:
    """Yield for each axis the distance of each element from the first one of its class.

    Classes that occur in different rhythms, such as blocks of different lengths, may not change places.
    """
    for (_, dim), label in axes.labels.items():
        ids = classes[label.numpy()]
        _, inverse, first = first_positions(ids, dim)
        yield Apart(label.numpy().ravel(), (positions(ids, dim) - first[inverse]).ravel())


def _families(cells: list[Ids], classes: Ids, axes: Axes) -> Iterator[Family]:
    """Group cells by the axes on which they lie."""
    cell_of = np.full(len(classes), -1)
    for number, cell in enumerate(cells):
        cell_of[cell] = number
    lying: dict[int, list[tuple[str, int]]] = {number: [] for number in range(len(cells))}
    for axis, label in axes.labels.items():
        for number in np.unique(cell_of[classes[label.numpy()]]):
            if number >= 0:
                lying[int(number)].append(axis)
    grouped: dict[tuple[tuple[str, int], ...], list[Ids]] = {}
    for number, found in lying.items():
        grouped.setdefault(tuple(found), []).append(cells[number])
    for found_axes, members in grouped.items():
        if found_axes:
            yield Family(found_axes, tuple(sorted(members, key=lambda cell: int(cell[0]))))
