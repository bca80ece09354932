"""What is kept of a weight at rest: its compressed form for the sparse kernel, or for the dense one its masked form."""

from collections.abc import Callable

from torch import Tensor

from nmcompile.ir.choice import Choice
from nmcompile.ir.kept import Kept, can_keep
from nmcompile.ir.operations import apply_mask

_compressed: Kept[Tensor] = Kept()
_masked: Kept[Tensor] = Kept()


def compressed_weight(
    weight: Tensor, mask: Tensor | None, size: tuple[int, int], compress: Callable[[], Tensor]
) -> Tensor:
    """What `compress` gives, with zeros appended to that size; kept while the weight is at rest."""
    return _compressed.get(weight, (mask,), size, compress) if can_keep(weight, mask) else compress()


def masked_weight(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The weight under its mask; kept while the weight is at rest."""
    if mask is None:
        return weight
    if not can_keep(weight, mask):
        return apply_mask(weight, mask)
    return _masked.get(weight, (mask,), None, lambda: apply_mask(weight, mask))


def forget_other(weight: Tensor, choice: Choice | None) -> None:
    """Free the form that the chosen kernel does not read."""
    if choice is not None:
        (_masked if choice.kernel == "sparse" else _compressed).forget(weight)
