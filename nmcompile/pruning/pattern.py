"""The sparsity pattern N:M, counted as N kept of every M consecutive elements along an axis."""

import re
from dataclasses import dataclass
from numbers import Integral

from nmcompile.errors import ConfigError


@dataclass(frozen=True)
class NMPattern:
    """N kept of every M consecutive elements (the paper counts the pruned ones; equal for 1:2, 2:4, 4:8).

    The axis is not part of the pattern: operators take it as `dim`, plan rows name it.
    """

    n_keep: int
    block: int

    def __post_init__(self) -> None:
        are_whole = isinstance(self.n_keep, Integral) and isinstance(self.block, Integral)
        if not are_whole or not 1 <= self.n_keep < self.block:
            raise ConfigError(
                f"pattern {self.n_keep}:{self.block} keeps N of every M elements and needs 1 <= N < M, as in '2:4'"
            )

    @classmethod
    def parse(cls, text: "str | NMPattern") -> "NMPattern":
        """Read `"2:4"`; a pattern passes through."""
        if isinstance(text, NMPattern):
            return text
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(f"pattern {text!r} is not of the form 'N:M', N kept of every M, as in '2:4'")
        return cls(int(match[1]), int(match[2]))

    @property
    def density(self) -> float:
        """The fraction of elements that is kept."""
        return self.n_keep / self.block

    def __str__(self) -> str:
        return f"{self.n_keep}:{self.block}"
