"""Operators that take no elements of a tensor: they ask for its type or its shape, or look up rows of it."""

METADATA = {"dtype", "device", "shape", "ndim", "requires_grad", "size", "dim", "numel", "is_cuda", "layout", "type"}
ELSEWHERE = {"embedding"}
"""An embedding owns the weight that it looks up; a linear layer that shares it is tied, which is another reason."""
LIKE_SECOND = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""Operators that take the type or the shape of their second operand."""


def is_metadata(name: str) -> bool:
    """Return whether an operator of that name takes no elements of a weight that it is given."""
    return name in METADATA | ELSEWHERE or name.startswith("new_") or name.endswith("_like")
