"""The kinds of operators that treat channels alike, and what each asks of the labels of its operands.

Each rule notes its demands in `Constraints` and returns the labels of the result. A label that a rule drops has a fixed
place from then on.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nmcompile.permutation.constraints import Constraints
from nmcompile.permutation.labels import FIXED, Label, Shape, Value, along, compact, dims_of


@dataclass(frozen=True)
class Rules:
    """The rules, for one node of the graph; `name` is the node's in reasons."""

    constraints: Constraints
    name: str

    def fix(self, values: Iterable[Value], reason: str, dims: Iterable[int] | None = None) -> None:
        """Fix every label that varies along one of the dims, or every label at all."""
        wanted = None if dims is None else frozenset(dims)
        for value in values:
            for label in value.labels:
                if wanted is None or wanted & dims_of(label):
                    self.constraints.separate(label, dims_of(label), reason)

    def carried(self, value: Value, shape: Shape, kept: int) -> Value:
        """Return a result of another shape whose last `kept` dims are the operand's; other dims mix their elements."""
        ahead = len(value.shape) - kept
        self.fix([value], f"{self.name} mixes or selects them", range(ahead))
        labels = [label for label in value.labels if min(dims_of(label), default=ahead) >= ahead]
        lead = (1,) * (len(shape) - kept)
        return Value(shape, tuple(label.reshape(lead + tuple(label.shape[ahead:])) for label in labels))

    def pooled(self, value: Value, shape: Shape, mixed: Iterable[int]) -> Value:
        """Return a result of as many dims, some of which mix their elements."""
        dims = frozenset(mixed)
        self.fix([value], f"{self.name} mixes them", dims)
        return Value(shape, tuple(label for label in value.labels if not dims & dims_of(label)))

    def elementwise(self, values: Sequence[Value], shape: Shape) -> Value:
        """Unify the labels of operands where they meet; what only one operand tells apart, the others fix."""
        aligned = [value.with_dims(len(shape)) for value in values]
        result: list[Label] = []
        for index, value in enumerate(aligned):
            others = aligned[:index] + aligned[index + 1 :]
            for label in value.labels:
                if self._hold(label, others):
                    continue
                partners = [one for one in result if dims_of(one) & dims_of(label)]
                for one in partners:
                    self.constraints.unify(one, label)
                if not partners:
                    result.append(label)
        return Value(shape, tuple(result))

    def _hold(self, label: Label, others: Sequence[Value]) -> bool:
        """Separate a label along the dims that only other operands tell apart; return whether nothing is left."""
        self.constraints.use(label)
        uncovered: frozenset[int] = frozenset()
        origin = ""
        for other in others:
            met = [dims_of(one) for one in other.labels if dims_of(one) & dims_of(label)]
            full = {dim for dim, size in enumerate(other.shape) if size != 1}
            alone = (dims_of(label) & full) - frozenset().union(*met)
            uncovered, origin = uncovered | alone, origin or (other.origin if alone else "")
        if uncovered:
            self.constraints.separate(label, uncovered, f"{self.name} combines them with {origin or FIXED}")
        return uncovered == dims_of(label)

    def reduced(self, value: Value, dims: Iterable[int]) -> tuple[Label, ...]:
        """Note a symmetric reduction over some dims, and return the labels that it leaves."""
        over = frozenset(dim % len(value.shape) for dim in dims)
        for label in value.labels:
            self.constraints.use(label)
            if dims_of(label) & over and dims_of(label) - over:
                self.constraints.separate(label, dims_of(label) - over, f"{self.name} reduces them in groups")
        return tuple(label for label in value.labels if not dims_of(label) & over)

    def joined(self, values: Sequence[Value], dim: int, shape: Shape) -> Value:
        """Concatenate labels that vary along `dim`, and unify the others."""
        dim %= len(shape)
        rest = [Value(v.shape, tuple(one for one in v.labels if dim not in dims_of(one))) for v in values]
        outer = [Value(tuple(1 if d == dim else n for d, n in enumerate(v.shape)), v.labels) for v in rest]
        labels = self.elementwise(outer, shape).labels
        parts = [[one for one in value.labels if dim in dims_of(one)] for value in values]
        if not any(parts):
            return Value(shape, labels)
        for value, found in zip(values, parts, strict=True):
            self.fix([Value(value.shape, tuple(found[1:]))], f"{self.name} joins them")
            found[1:] = []
            self.constraints.use(found[0]) if found else found.append(self._fixed(value.shape[dim], dim, len(shape)))
        sizes = [max(part[0].shape[d] for part in parts) for d in range(len(shape))]
        whole = [
            part[0].expand([value.shape[dim] if d == dim else n for d, n in enumerate(sizes)])
            for part, value in zip(parts, values, strict=True)
        ]
        return Value(shape, (*labels, compact(torch.cat(whole, dim))))

    def _fixed(self, count: int, dim: int, dims: int) -> Label:
        label = along(self.constraints.fresh(count), dim, dims)
        self.constraints.separate(label, {dim}, f"{self.name} joins values without channels of a layer to them")
        return label

    def padded(self, value: Value, pads: Sequence[int], shape: Shape) -> Value:
        """Pad labels: new channels have a fixed place, new positions belong to the channels beside them."""
        labels = []
        for label in value.labels:
            self.constraints.use(label)
            for number in range(len(pads) // 2):
                dim = len(shape) - 1 - number
                if dim in dims_of(label):
                    sizes = pads[2 * number : 2 * number + 2]
                    ends = [self._fixed(max(0, n), dim, len(shape)) for n in sizes]
                    inner = F.pad(label, [0, 0] * number + [min(0, n) for n in sizes])
                    ends = [end.expand([*inner.shape[:dim], -1, *inner.shape[dim + 1 :]]) for end in ends]
                    label = torch.cat([ends[0], inner, ends[1]], dim)
            labels.append(label)
        return Value(shape, tuple(labels))
