"""The rule of products: linear layers, convolutions, matrix products and attention are sums over shared letters.

"nix,goi->ngox" and the like, as in einsum: a letter that the result lacks is summed over; a batch letter is in both
operands and in the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nmcompile.permutation.constraints import Constraints
from nmcompile.permutation.labels import FIXED, Label, Shape, Value, dims_of


@dataclass(frozen=True)
class _Term:
    """A label of an operand, in a space with a dim for each letter, and the operand on the other side."""

    label: Label
    other: Value
    partners: Sequence[Label]


def contract(
    constraints: Constraints, name: str, left: Value, right: Value, equation: tuple[str, str, str], shape: Shape
) -> Value:
    """Note what a product of two values asks of their labels, and return the result.

    A label that varies along a summed letter needs a partner in the other operand with which it moves.
    """
    letters = "".join(dict.fromkeys("".join(equation)))
    summed = frozenset(letters.index(one) for one in letters if one not in equation[2])
    operands = [_spread(value, text, letters) for value, text in ((left, equation[0]), (right, equation[1]))]
    result: list[Label] = []
    for mine, other in (operands, operands[::-1]):
        for label in mine.labels:
            is_summed = bool(dims_of(label) & summed)
            same = [one for one in other.labels if bool(dims_of(one) & summed) == is_summed]
            meeting = summed if is_summed else frozenset(range(len(letters)))
            term = _Term(label, other, [one for one in same if dims_of(one) & dims_of(label) & meeting])
            _demand(constraints, name, term, summed)
            if not is_summed and not any(one is partner for one in result for partner in term.partners):
                result.append(label)
    order = [letters.index(one) for one in equation[2]]
    return Value(shape, tuple(_ordered(label, order) for label in result))


def _demand(constraints: Constraints, name: str, term: _Term, summed: frozenset[int]) -> None:
    """Unify a label with its partners, and separate what the other operand or the sum tells apart."""
    constraints.use(term.label)
    covered: frozenset[int] = frozenset().union(*map(dims_of, term.partners))
    for partner in term.partners:
        constraints.unify(term.label, partner)
    full = frozenset(dim for dim, size in enumerate(term.other.shape) if size != 1)
    if apart := (dims_of(term.label) & full) - covered:
        constraints.separate(term.label, apart, f"{name} multiplies them by {term.other.origin or FIXED}")
    if dims_of(term.label) & summed and dims_of(term.label) - summed:
        constraints.separate(term.label, dims_of(term.label) - summed, f"{name} sums over them in groups")


def _spread(value: Value, text: str, letters: str) -> Value:
    """Return a value with a dim for each letter, of size 1 for those that it lacks."""
    order = sorted(range(len(text)), key=lambda dim: letters.index(text[dim]))

    def spread(sizes: Sequence[int]) -> Shape:
        found = iter([sizes[dim] for dim in order])
        return tuple(next(found) if one in text else 1 for one in letters)

    labels = tuple(one.permute(order).reshape(spread(one.shape)) for one in value.labels)
    return Value(spread(value.shape), labels, value.origin)


def _ordered(label: Label, order: Sequence[int]) -> Label:
    """Return a label with only the result's letters, in their order."""
    rest = [dim for dim in range(label.dim()) if dim not in order]
    return label.permute([*order, *rest]).reshape([label.shape[dim] for dim in order])
