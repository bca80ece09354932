"""Readers of a layer's output: a batch norm that export absorbs, layers that take integers, or anything else."""

from collections.abc import Iterator, Sequence

from torch import fx, nn

from nmcompile.capture.ranges import plain_name
from nmcompile.ir.calls import match_call
from nmcompile.ir.captured import WholeGraph

# Export makes bounds of integers out of their bounds.
BOUNDED = {"relu6", "hardtanh"}
# Operators that leave integers on their grid: zero stays zero, order is preserved, elements only move.
TRANSPARENT = {
    *BOUNDED, "relu", "identity", "dropout", "dropout1d", "dropout2d", "dropout3d", "featuredropout", "flatten",
    "unflatten", "view", "reshape", "permute", "transpose", "t", "contiguous", "squeeze", "unsqueeze", "clone",
    "alias", "detach",
    *(f"maxpool{dims}d" for dims in (1, 2, 3)),
}  # fmt: skip


def norm_behind(whole: WholeGraph, nodes: Sequence[fx.Node]) -> str:
    """Return the batch norm that alone reads a layer's output, if each is called once; else `""`."""
    if len(nodes) != 1 or len(nodes[0].users) != 1:
        return ""
    norm = next(iter(nodes[0].users))
    name = whole.norms.get(norm, "")
    is_its_input = norm.args[:1] == (nodes[0],) or norm.kwargs.get("input") is nodes[0]
    return name if is_its_input and list(whole.norms.values()).count(name) == 1 else ""


def readers_behind(model: nn.Module, whole: WholeGraph, node: fx.Node) -> frozenset[str]:
    """Return the layers that read a value through operators that preserve integers, `""` for any other reader.

    The result is empty if the model returns the value.
    """
    found = list(_readers(model, whole, node))
    return frozenset() if None in found else frozenset(name for name in found if name is not None)


def _readers(model: nn.Module, whole: WholeGraph, node: fx.Node) -> Iterator[str | None]:
    """Yield the readers by name, `""` if it is not a layer; None is the model's output."""
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output":
                yield None
            elif user in whole.layers or match_call(user) is not None:
                names = whole.layers.get(user, ())
                yield names[0] if len(names) == 1 else ""
            elif plain_name(model, user) not in TRANSPARENT:
                yield ""
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
