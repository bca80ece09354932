"""Layers to be pruned, as matrices of scores whose columns are channels."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nmcompile.ir.captured import Captured
from nmcompile.ir.layers import Layer
from nmcompile.permutation.constraints import Ids
from nmcompile.permutation.families import Channels
from nmcompile.permutation.fold import Moves, fold
from nmcompile.permutation.scores import Scores
from nmcompile.pruning.pattern import NMPattern

Patterns = Mapping[str, tuple[NMPattern, bool]]
"""Pattern of each layer, and whether its mask is transposable, by layer name."""
AT_ONCE = 64  # blocks of columns that are summed at once


@dataclass(frozen=True)
class Pruned:
    """A layer that will be pruned: the weight's first name, its scores, and the classes along its axes by dim."""

    layer: Layer
    weight: str
    scores: Tensor
    axes: Mapping[int, Ids]
    pattern: NMPattern
    is_transposable: bool

    def views(self, moves: Moves) -> Iterator[tuple[Scores, Ids]]:
        """Yield the moved scores of each group, and the classes at the places of their columns.

        A transposable mask has a second view, whose columns are the rows of the first.
        """
        scores = fold(self.scores, self.axes, moves)
        layer = self.layer
        for number, group in enumerate(scores.chunk(layer.groups, layer.out_dim)):
            for dim, other in ((layer.in_dim, layer.out_dim), (layer.out_dim, layer.in_dim))[
                : 1 + self.is_transposable
            ]:
                columns = group.movedim((dim, other), (0, -1)).flatten(1).contiguous()
                yield Scores(columns, self.pattern, self.is_transposable), self._classes(dim, number)

    def _classes(self, dim: int, group: int) -> Ids:
        """Return the classes at the places along a dim in one group; -1 if nothing there is labelled."""
        size = self.scores.shape[dim] // (self.layer.groups if dim == self.layer.out_dim else 1)
        ids = self.axes.get(dim)
        if ids is None:
            return np.full(size, -1)
        if ids.size == ids.shape[dim]:  # one label for all groups, or rows one group after the other
            return ids.ravel()[group * size :][:size] if dim == self.layer.out_dim else ids.ravel()
        rows: Ids = np.moveaxis(ids, dim, -1).reshape(-1, size)
        return rows[group * (ids.shape[0] // self.layer.groups) :][:1].ravel()

    def kept(self, moves: Moves) -> float:
        """Return the sum of the scores that the pattern keeps; tiles that cannot be enumerated count by their rows."""
        views = list(self.views(moves))[:: 1 + self.is_transposable]
        return sum(_kept(scores) for scores, _ in views)

    @property
    def total(self) -> float:
        """Return the sum of all scores."""
        return float(self.scores.sum(dtype=torch.float64))


def _kept(scores: Scores) -> float:
    columns = torch.arange(len(scores.columns))
    blocks = columns.split(scores.pattern.block)
    whole = [block for block in blocks if len(block) == scores.pattern.block]
    groups = [*torch.stack(whole).split(AT_ONCE)] if whole else []
    groups += [block[None] for block in blocks if scores.pattern.n_keep <= len(block) < scores.pattern.block]
    return sum(float(scores.kept(group).sum(dtype=torch.float64)) for group in groups)


def pruned_layers(
    captured: Captured, channels: Channels, tensors: Mapping[str, Tensor], patterns: Patterns
) -> Iterator[Pruned]:
    """Yield the layers of `patterns` whose weight is one of `tensors` and has labels; scores are magnitudes."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    for site in captured.sites:
        name = site.layer.name
        weight = names.get(site.weight, "")
        if name not in patterns or site.is_expression or not channels.axes.of(weight):
            continue
        axes = {dim: channels.classes_of(label) for dim, label in channels.axes.of(weight).items()}
        yield Pruned(site.layer, weight, tensors[site.weight].detach().abs().float(), axes, *patterns[name])
