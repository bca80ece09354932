"""The two lines in which TensorRT reports what it did with 2:4 weights.

Releases differ: `Layers eligible for sparse math: a, b` and `TRT inference plan picked sparse implementation for
layers: a`; or `Found 2 layer(s) eligible to use sparse tactics: a, b` and `Chose 1 layer(s) using sparse tactics: a`,
with or without the names.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

ELIGIBLE = re.compile(r"\(Sparsity\) (?:Layers eligible for sparse math|Found (\d+) layer\(s\) eligible[^:\n]*)(.*)")
CHOSEN = re.compile(r"\(Sparsity\) (?:TRT inference plan picked sparse[^:\n]*|Chose (\d+) layer\(s\)[^:\n]*)(.*)")


@dataclass(frozen=True)
class Listed:
    """Layers of one kind: their number, and their names if the builder gave them."""

    count: int
    names: frozenset[str] | None

    def has(self, name: str) -> bool | None:
        """Return whether a layer or ONNX node is among them, alone or fused; None if that is unknown."""
        if self.names is None:
            return None if self.count else False
        return any(name in fused.split(" + ") for fused in self.names)


@dataclass(frozen=True)
class SparsityLog:
    """The eligible and the chosen layers; None if the builder said nothing, as TensorRT-RTX does."""

    eligible: Listed | None
    chosen: Listed | None


def parse_sparsity(lines: Iterable[str]) -> SparsityLog:
    """Read a builder's messages; the last of each kind counts, as one is printed per selection of tactics."""
    text = "\n".join(lines)
    return SparsityLog(_last(ELIGIBLE, text), _last(CHOSEN, text))


def _last(pattern: "re.Pattern[str]", text: str) -> Listed | None:
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    count, rest = matches[-1].groups()
    names = frozenset(name for name in re.split(r",\s+", rest.strip(": ")) if name)
    if count is None:
        return Listed(len(names), names)
    return Listed(int(count), names if len(names) == int(count) else None)
