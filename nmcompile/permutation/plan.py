"""Permutations of a whole model: found family by family, and written into its tensors."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from nmcompile.ir.captured import Captured
from nmcompile.permutation.constraints import Ids
from nmcompile.permutation.families import Channels, Family, find_families
from nmcompile.permutation.fold import Moves, fold
from nmcompile.permutation.layers import Patterns, Pruned, pruned_layers
from nmcompile.permutation.scores import Scores
from nmcompile.permutation.search import find_order

COMPUTED = "its weight is computed, or is not a parameter of its own"


@dataclass(frozen=True)
class LayerChange:
    """The kept scores of a layer before and after; a reason if its in-channels keep their order.

    Args:
        before, after: the sum of the scores that the pattern keeps.
        total: the sum of all scores.
        reason: why the in-channels keep their places; "" if they may move.
    """

    before: float = 0.0
    after: float = 0.0
    total: float = 0.0
    reason: str = ""

    @property
    def won_back(self) -> float:
        """Return the share of the lost scores that is kept after all."""
        lost = self.total - self.before
        return (self.after - self.before) / lost if lost > 0 else 0.0


@dataclass(frozen=True)
class Permutations:
    """Permutations that leave a model's outputs as they are.

    Args:
        report: by layer name, what it keeps.
        families: the axes that are permuted together.
        channels: the labels of the model's tensors; None if nothing may move.
        moves: by class of channels, the class that comes to its places.
    """

    report: Mapping[str, LayerChange]
    families: tuple[Family, ...] = ()
    channels: Channels | None = None
    moves: Moves = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the new values of the parameters and buffers that change, by every name; the model stays unchanged."""
        found: dict[int, Tensor] = {}
        held = persistent_tensors(model)
        if self.channels is None:
            return {}
        for name, tensor in held.items():
            if axes := self.channels.axes.of(name):
                classes = {dim: self.channels.classes_of(label) for dim, label in axes.items()}
                found[id(tensor)] = fold(tensor.detach(), classes, self.moves)
        changed = {name: found[id(tensor)] for name, tensor in held.items() if id(tensor) in found}
        return {name: tensor for name, tensor in changed.items() if tensor.data_ptr() != held[name].data_ptr()}


def persistent_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of `state_dict`, under all of their names: what a permutation may change.

    A buffer that is not saved would be computed anew in its old order.
    """
    saved = {
        join(prefix, name) for prefix, module in model.named_modules(remove_duplicate=False) for name in _saved(module)
    }
    both = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in both if name in saved}


def join(prefix: str, name: str) -> str:
    """Return the full name of a module's tensor."""
    return f"{prefix}.{name}" if prefix else name


def _saved(module: nn.Module) -> list[str]:
    buffers = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
    return [*module._parameters, *buffers]


def plan_permutations(captured: Captured, tensors: Mapping[str, Tensor], patterns: Patterns) -> Permutations:
    """Find the permutations of channels of which the patterns keep most.

    Args:
        captured: the model, captured with example inputs.
        tensors: its parameters and saved buffers by name (see `persistent_tensors`).
        patterns: by layer name, the pattern, and whether the mask is transposable.
    """
    channels = find_families(captured, tensors)
    if isinstance(channels, str):
        return Permutations({name: LayerChange(reason=channels) for name in patterns})
    layers = list(pruned_layers(captured, channels, tensors, patterns))
    moves: Moves = np.arange(len(channels.classes))
    before = {one.layer.name: one.kept(moves) for one in layers}
    for family in channels.families:
        moves = _improved(family, [one for one in layers if _lies_on(one, family)], moves)
    report = {name: LayerChange(reason=COMPUTED) for name in patterns}
    for one in layers:
        name, label = one.layer.name, channels.axes.labels.get((one.weight, one.layer.in_dim))
        reason = "it has one in-channel in each group" if label is None else channels.reason(label)
        report[name] = LayerChange(before[name], one.kept(moves), one.total, reason)
    return Permutations(report, channels.families, channels, moves)


def _lies_on(layer: Pruned, family: Family) -> bool:
    """Return whether a family's order changes what a layer keeps."""
    dims = {layer.layer.in_dim, layer.layer.out_dim} if layer.is_transposable else {layer.layer.in_dim}
    return any((layer.weight, dim) in family.axes for dim in dims)


def _improved(family: Family, layers: Sequence[Pruned], moves: Moves) -> Moves:
    """Return the moves with better orders of a family's cells; the old ones if all layers together keep no more."""
    if not layers:
        return moves
    views = [view for layer in layers for view in layer.views(moves)]
    better = moves.copy()
    for cell in family.cells:
        places, parts = _columns_of(cell, views)
        if parts:
            order = find_order(parts).numpy()
            better[places] = moves[places[order]]
    gains = [layer.kept(better) - layer.kept(moves) for layer in layers]
    return better if sum(gains) > 0 else moves


def _columns_of(cell: Ids, views: Sequence[tuple[Scores, Ids]]) -> tuple[Ids, list[Scores]]:
    """Return the places of a cell in whole blocks, and the scores of their columns.

    The places of a cell may fall into blocks in several ways, as after concatenations of odd sizes. The way with the
    largest scores counts.
    """
    found: dict[bytes, tuple[Ids, list[Scores]]] = defaultdict(lambda: (cell[:0], []))
    for scores, classes in views:
        where = np.flatnonzero(np.isin(classes, cell))
        ranks = np.searchsorted(cell, classes[where])
        occurrence = _occurrences(ranks)
        for number in range(occurrence.max(initial=-1) + 1):
            at, rank = where[occurrence == number], ranks[occurrence == number]
            _, inverse, counts = np.unique(at // scores.pattern.block, return_inverse=True, return_counts=True)
            is_whole = counts[inverse] == scores.pattern.block
            at, rank = at[is_whole], rank[is_whole]
            if not len(at):
                continue
            rows = np.sort(rank.reshape(-1, scores.pattern.block), axis=1)
            first = np.argsort(rows[:, 0])
            key = rows[first].tobytes()
            placed = at.reshape(rows.shape)[np.arange(len(rows))[:, None], np.argsort(rank.reshape(rows.shape), axis=1)]
            columns = scores.columns[placed[first].ravel()]
            found[key] = (
                cell[rows[first].ravel()],
                [*found[key][1], Scores(columns, scores.pattern, scores.is_transposable)],
            )
    if not found:
        return cell[:0], []
    return max(found.values(), key=lambda one: sum(float(part.columns.sum()) for part in one[1]))


def _occurrences(ranks: Ids) -> Ids:
    """Return for each element how many equal ones stand before it."""
    order = np.argsort(ranks, kind="stable")
    starts = np.searchsorted(ranks[order], ranks[order])
    result = np.empty_like(ranks)
    result[order] = np.arange(len(ranks)) - starts
    return result
