"""Reasons for dense parameters, in kinds: those that a layer or the paper needs, and those that nmcompile could mend.

Code that multiplies by a parameter and is not a layer has a kind without need too.
"""

from typing import NamedTuple

from nmcompile.planning.plan_phases import FIRST, LAST, RECURRENT, TIED


class Need(NamedTuple):
    """A kind of need: its words in a report's reasons, and its meaning."""

    words: str
    meaning: str


NEEDS = {
    "depthwise": Need("depthwise convolution", "one in-channel per group leaves nothing to prune along"),
    "first layer": Need(FIRST, "the paper leaves it dense (§6.1)"),
    "last linear": Need(LAST, "the paper leaves it dense (§6.4)"),
    "tied": Need(TIED, "its weight is an embedding's too, whose rows are looked up"),
    "recurrent": Need(RECURRENT, "one fused kernel runs its GEMMs; a layer that the config names is pruned"),
    "indivisible": Need("are not a multiple of", "the block does not divide its channels"),
}
"""Every other reason why a layer is dense is without need."""
WITHOUT = {
    "bypassed": "bypassed",
    "two axes": "multiplied along its other axis",
    "transposed convolution": "transposed convolution",
    "bilinear": "bilinear",
    "own forward": "has its own forward",
    "weight dims": "its weight has",
    "not a linear layer": "it is not a linear layer",
    "left operand": "its weight is the left operand",
    "computed weight": "its weight depends on the input",
    "control flow": "proxy",
    "tests a type": "tests the type",
    "tests for None": "tests the argument",
    "tests identity": "tests the identity or type",
    "catches exceptions": "catches exceptions",
    "asks for an attribute": "asks whether",
    "draws": "draws random numbers",
    "traces differ": "traces in train() and eval() differ",
    "changes attributes": "changes its attributes",
    "tensor constant": "tensor constant",
}
"""Kinds without need, in the order in which they are looked for in a reason."""


def need_of(reason: str) -> str:
    """Return the kind of need that a reason names, or ""."""
    return next((kind for kind, need in NEEDS.items() if need.words in reason), "")


def kind_of(reason: str) -> str:
    """Return the kind of a reason that names no need; "other" if it is none of the known ones."""
    return next((kind for kind, words in WITHOUT.items() if words in reason), "other")
