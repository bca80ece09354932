"""The public pruning operators: those of `nmcompile.pruning`, by a kernel if the tensor's device has one.

Kernels return the bits of the reference operators in `nmcompile.pruning.OPERATORS`, draw for draw.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps

import torch
from torch import Tensor

from nmcompile.backends.cpu.prune import cpu_prune, cpu_prune_mask, cpu_prune_out
from nmcompile.backends.cpu.transposable import cpu_transposable_mask
from nmcompile.backends.triton.operators import triton_prune, triton_prune_out, triton_transposable_mask
from nmcompile.pruning.magnitude import mask as reference_greedy_mask
from nmcompile.pruning.operator import BlockOperator
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.references import OPERATORS
from nmcompile.pruning.transposable import transposable_mask as reference_transposable_mask

PRUNE: dict[str, tuple[Callable[..., Tensor], Callable[..., None]]] = {
    "cpu": (cpu_prune, cpu_prune_out),
    "cuda": (triton_prune, triton_prune_out),
}
"""Operators by device: one returns a pruned tensor, one writes it; the reference runs if no kernel fits."""
MASK: dict[str, Callable[[Tensor, int, int], Tensor]] = {"cpu": cpu_transposable_mask, "cuda": triton_transposable_mask}


class AcceleratedOperator(BlockOperator):
    """A pruning operator that runs a kernel on devices that have one."""

    @torch.no_grad()
    def write(self, x: Tensor, pattern: NMPattern, dim: int, key: Tensor | None, out: Tensor | None) -> Tensor:
        """Prune checked operands into `out` or a new tensor."""
        if x.device.type not in PRUNE:
            return super().write(x, pattern, dim, key, out)
        prune, prune_out = PRUNE[x.device.type]
        rule = self.name, pattern.n_keep, pattern.block, dim
        if out is None:
            return prune(x.detach(), *rule, key)
        prune_out(x.detach(), *rule, out.detach(), key)
        return out

    def find(self, x: Tensor, pattern: NMPattern, dim: int) -> Tensor:
        """Return the mask of checked operands."""
        if x.device.type != "cpu":
            return super().find(x, pattern, dim)
        return cpu_prune_mask(x, self.name, pattern.n_keep, pattern.block, dim)


@wraps(reference_transposable_mask)
def transposable_mask(
    w: Tensor, pattern: NMPattern | str, *, dims: tuple[int, int] = (-2, -1), method: str = "exact"
) -> Tensor:
    # The reference takes all other arguments, and raises for wrong ones.
    fits = isinstance(method, str) and method == "exact" and NMPattern.parse(pattern) == NMPattern(2, 4)
    if fits and isinstance(w, Tensor) and w.device.type in MASK and isinstance(dims, tuple) and len(dims) == 2:
        return MASK[w.device.type](w.detach(), *dims)
    return reference_transposable_mask(w, pattern, dims=dims, method=method)


def _accelerated(name: str) -> AcceleratedOperator:
    reference = OPERATORS[name]
    assert isinstance(reference, BlockOperator)
    return AcceleratedOperator(**{one.name: getattr(reference, one.name) for one in fields(BlockOperator)})


# The operators by the names under which users import them from `nmcompile.pruning`.
ACCELERATED = {name: _accelerated(name) for name in OPERATORS}


@wraps(reference_greedy_mask)
def mask(x: Tensor, pattern: NMPattern | str, dim: int = -1) -> Tensor:
    return ACCELERATED["greedy"].mask(x, pattern, dim)
