"""The sparsity pattern N:M, counted as N kept of every M consecutive elements along an axis."""

import re
from dataclasses import dataclass
from numbers import Integral

from nmcompile.checks import described
from nmcompile.errors import ConfigError

LARGEST_BLOCK = 1024
"""Largest number of elements of a block.

A pattern may come from a file, and operators pad a tensor to whole blocks; no hardware and no paper goes beyond 64.
"""
DIGITS = 20
FORM = re.compile(rf"\s*([0-9]{{1,{DIGITS}}})\s*:\s*([0-9]{{1,{DIGITS}}})\s*")


@dataclass(frozen=True)
class NMPattern:
    """N kept of every M consecutive elements (the paper counts the pruned ones; equal for 1:2, 2:4, 4:8).

    The axis is not part of the pattern: operators take it as `dim`, plan rows name it.
    """

    n_keep: int
    block: int

    def __post_init__(self) -> None:
        numbers = (self.n_keep, self.block)
        are_whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers)
        if not are_whole or not 1 <= self.n_keep < self.block <= LARGEST_BLOCK:
            shown = ":".join(map(described, numbers))
            raise ConfigError(
                f"pattern {shown} keeps N of every M elements and needs 1 <= N < M <= {LARGEST_BLOCK}, as in '2:4'"
            )

    @classmethod
    def parse(cls, text: "str | NMPattern") -> "NMPattern":
        """Read `"2:4"`; a pattern passes through."""
        if isinstance(text, NMPattern):
            return text
        match = FORM.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(f"pattern {described(text)} is not of the form 'N:M', N kept of every M, as in '2:4'")
        return cls(int(match[1]), int(match[2]))

    @property
    def density(self) -> float:
        """Return the fraction of elements that is kept."""
        return self.n_keep / self.block

    def __str__(self) -> str:
        return f"{self.n_keep}:{self.block}"
