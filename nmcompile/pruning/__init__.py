"""Pruning operators for N:M sparsity, usable alone: `greedy(x, "2:4")`, `mvue(x, "2:4", dim=0, generator=g)`.

The operators of this module run a native or a Triton kernel where the tensor's device has one. `OPERATORS` holds the
reference operators, written in PyTorch, which the kernels equal bit for bit.
"""

from typing import TYPE_CHECKING

from nmcompile.pruning.operator import PruningOperator as PruningOperator
from nmcompile.pruning.operator import check as check
from nmcompile.pruning.pattern import NMPattern as NMPattern
from nmcompile.pruning.philox import draw_key as draw_key
from nmcompile.pruning.references import OPERATORS as OPERATORS

if TYPE_CHECKING:
    from nmcompile.api.prune import mask as mask
    from nmcompile.api.prune import transposable_mask as transposable_mask

    greedy: PruningOperator
    greedy_by_value: PruningOperator
    mvue: PruningOperator
    mvue_one_of_two: PruningOperator
    mvue_pairs: PruningOperator
    mvue_approx: PruningOperator
    biased: PruningOperator
    uniform: PruningOperator
    unbiased: PruningOperator
    sdgp: PruningOperator


def __getattr__(name: str) -> object:
    # Kernels stand above the reference operators, so they are looked up when an operator is first used.
    if name not in OPERATORS and name not in ("mask", "transposable_mask"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nmcompile.api import prune

    return prune.ACCELERATED[name] if name in OPERATORS else getattr(prune, name)
