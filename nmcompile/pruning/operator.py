"""The protocol of pruning operators, and the operator that works on blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nmcompile.checks import check_kind, check_tensor, described
from nmcompile.errors import ConfigError, OperandError
from nmcompile.pruning.blocks import join, split
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.philox import draw_key, uniforms
from nmcompile.pruning.selection import Selection, largest, magnitudes, total

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Select = Callable[[Tensor, NMPattern, Tensor], Selection]
"""(blocks `(M, blocks)`, pattern, uniform numbers `(draws, blocks)`) -> selection; all in float32, or float64."""

Rescale = Callable[[Tensor, Tensor, int], Tensor]
"""(dense tensor, pruned tensor, dim) -> pruned tensor with other values and the same zeros."""


class PruningOperator(Protocol):
    """An operator that keeps N of every M consecutive elements of a tensor along a dim, and zeros the others."""

    @property
    def name(self) -> str:
        """Return the operator's name in `OPERATORS`, configs and reports."""

    @property
    def unbiased(self) -> bool:
        """Return whether the expectation of the result is the tensor."""

    @property
    def needs_key(self) -> bool:
        """Return whether the operator draws random numbers."""

    def __call__(
        self,
        x: Tensor,
        pattern: NMPattern | str,
        *,
        dim: int = -1,
        generator: torch.Generator | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Prune `x`, with a key drawn from `generator` if the operator needs one."""

    def prune(self, x: Tensor, pattern: NMPattern | str, dim: int, key: Tensor | None) -> Tensor:
        """Prune `x` with a given key."""

    def mask(self, x: Tensor, pattern: NMPattern | str, dim: int = -1) -> Tensor:
        """Return the mask of the elements that a deterministic operator keeps."""


@dataclass(frozen=True)
class BlockOperator:
    """A pruning operator made of a plain function on blocks.

    Rules that hold for every operator: the result has the shape, dtype and device of the input, the strides of
    `torch.empty_like(x)`, and no gradient history; the input is never modified; a partial last block counts as padded
    with zeros; a random operator prunes a block whose magnitudes have no finite sum as `greedy` does, with NaN and
    infinity first, so the block stays non-finite.

    Args:
        name: the name in `OPERATORS`.
        select: selects the elements to keep of blocks `(M, blocks)`.
        draws: uniform numbers per block; block b uses the numbers `draws * b`, ..., `draws * b + draws - 1`.
        unbiased: whether the expectation of the result is the input.
        patterns: the patterns that fit, `"1:2"`; a letter stands for any number.
        rescale: changes the kept values after the blocks are joined again.
    """

    name: str
    select: Select
    draws: int = 0
    unbiased: bool = False
    patterns: str = "N:M"
    rescale: Rescale | None = None

    @property
    def needs_key(self) -> bool:
        """Return whether the operator draws random numbers."""
        return self.draws > 0

    def __call__(
        self,
        x: Tensor,
        pattern: NMPattern | str,
        *,
        dim: int = -1,
        generator: torch.Generator | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Prune `x` along `dim`.

        Args:
            x: float64, float32, bfloat16 or float16 of any shape but 0-d.
            pattern: an `NMPattern` or text, `"2:4"`.
            dim: the dim along which blocks run.
            generator: where a random operator draws its one key, on any device; `None` is torch's default generator.
            out: where to write the result: shape, dtype and device of `x`.

        Returns:
            `out`, or a new tensor of the shape, dtype and device of `x`, with the strides of `torch.empty_like(x)`.

        Raises:
            OperandError: `x` or `out` is not a tensor that the operator takes.
            ConfigError: the pattern does not fit the operator.
        """
        fitting, axis = self._fit(pattern), check(x, dim)
        check_kind("generator", generator, torch.Generator | None, "a torch.Generator, or None for torch's own")
        _check_out(x, out)
        key = draw_key(generator, x.device) if self.needs_key else None
        return self.write(x, fitting, axis, key, out)

    def prune(self, x: Tensor, pattern: NMPattern | str, dim: int, key: Tensor | None) -> Tensor:
        """Prune `x` along `dim` with a 64-bit key, 0-d int64 (see `draw_key`); `None` if the operator draws nothing.

        Raises:
            OperandError: the operator does not take `x`, or the key is missing or of another shape or dtype.
            ConfigError: the pattern does not fit the operator.
        """
        if self.needs_key and (not isinstance(key, Tensor) or key.dtype != torch.int64 or key.dim() != 0):
            got = f"{key.dtype} of shape {tuple(key.shape)}" if isinstance(key, Tensor) else described(key)
            raise OperandError(f"operator {self.name!r} takes a 0-d int64 key, not {got}; draw one with draw_key()")
        return self.write(x, self._fit(pattern), check(x, dim), key, None)

    def mask(self, x: Tensor, pattern: NMPattern | str, dim: int = -1) -> Tensor:
        """Return the mask of the kept elements, bool of the shape of `x`; zeros count as kept where they rank first.

        Raises:
            OperandError: `x` is not a tensor that the operator takes.
            ConfigError: the operator is random, or the pattern does not fit it.
        """
        if self.needs_key:
            raise ConfigError(f"operator {self.name!r} keeps other elements at each draw and has no mask; use 'greedy'")
        fitting, axis = self._fit(pattern), check(x, dim)
        return self.find(x.detach(), fitting, axis)

    def find(self, x: Tensor, pattern: NMPattern, dim: int) -> Tensor:
        """Return the mask of operands that were checked."""
        result = torch.empty_like(x, dtype=torch.bool)
        if x.numel():
            result.copy_(join(self._select(split(x, dim, pattern.block), pattern, None).mask, x, dim))
        return result

    @torch.no_grad()
    def write(self, x: Tensor, pattern: NMPattern, dim: int, key: Tensor | None, out: Tensor | None) -> Tensor:
        """Prune operands that were checked, into `out` or a new tensor."""
        result = torch.empty_like(x) if out is None else out
        if not x.numel():
            return result
        blocks = split(x, dim, pattern.block)
        selection = self._select(blocks, pattern, key)
        values = blocks if selection.values is None else selection.values.to(x.dtype)
        pruned = join(torch.where(selection.mask, values, 0.0), x, dim)
        return result.copy_(pruned if self.rescale is None else self.rescale(x, pruned, dim))

    def _select(self, blocks: Tensor, pattern: NMPattern, key: Tensor | None) -> Selection:
        wide = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
        if key is None:
            return self.select(wide, pattern, wide.new_empty(0, wide.shape[1]))
        u = uniforms(key.to(wide.device), wide.shape[1], self.draws).to(wide.dtype)
        return _greedy_where_not_finite(wide, pattern.n_keep, self.select(wide, pattern, u))

    def _fit(self, pattern: NMPattern | str) -> NMPattern:
        parsed = NMPattern.parse(pattern)
        wanted = zip(self.patterns.split(":"), (parsed.n_keep, parsed.block), strict=True)
        if any(text.isdigit() and int(text) != number for text, number in wanted):
            raise ConfigError(f"operator {self.name!r} takes {self.patterns}, not {parsed}; 'mvue' takes any N:M")
        return parsed


def check(x: Tensor, dim: int) -> int:
    """Return `dim` as a non-negative number, if operators can prune `x` along it.

    Raises:
        OperandError: `x` is not a dense float tensor, or has no such dim.
    """
    check_tensor("the tensor to prune", x)
    shape = tuple(x.shape)
    if x.dtype not in DTYPES or x.layout != torch.strided:
        raise OperandError(
            f"pruning takes a dense float64, float32, bfloat16 or float16 tensor, not {x.dtype} ({x.layout}) of shape "
            f"{shape}; convert it with .to(torch.float32) or .to_dense()"
        )
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise OperandError(f"dim is {described(dim)}; give the number of a dim")
    if not -x.dim() <= dim < x.dim():
        raise OperandError(f"dim {dim} does not exist in a tensor of shape {shape}; blocks need a dim to run along")
    return dim % x.dim()


def _check_out(x: Tensor, out: Tensor | None) -> None:
    if out is not None:
        check_tensor("out", out)
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        raise OperandError(
            f"out is {out.dtype} of shape {tuple(out.shape)} on {out.device}, expected {x.dtype} of shape "
            f"{tuple(x.shape)} on {x.device}; make it with torch.empty_like(x)"
        )


def _greedy_where_not_finite(blocks: Tensor, n_keep: int, selection: Selection) -> Selection:
    finite = torch.isfinite(total(blocks.abs()))
    mask = torch.where(finite, selection.mask, largest(magnitudes(blocks), n_keep))
    return Selection(mask, None if selection.values is None else torch.where(finite, selection.values, blocks))
