"""The operator that rebuilds a mask inside and outside compiled graphs."""

import torch
from torch import Tensor, nn

from nmcompile.custom_op import custom_op
from nmcompile.fingerprint import fingerprint
from nmcompile.pruning.magnitude import mask as greedy_mask
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.transposable import transposable_mask
from nmcompile.training.steady import discounted
from nmcompile.training.weight_clock import (
    ADDRESS,
    CONTENT,
    FOLLOWED,
    HOLDS,
    STALE,
    STEPPED,
    UNKNOWN,
    VERSION,
    staleness_of,
    tells_writes,
)
from nmcompile.weight_cache import FROZEN, Content

NEVER, UNTIL_FOLLOWED, ALWAYS = range(3)
"""Conditions under which a compiled call compares the weight's fingerprint."""


def when_compared(weight: Tensor, content: Content | None, is_trained: bool) -> int:
    """Return when `refresh_mask` compares: as `GemmTriple` does outside a compiled graph."""
    if content == FROZEN:
        return NEVER
    if is_trained and isinstance(weight, nn.Parameter):
        return UNTIL_FOLLOWED
    return ALWAYS if weight.device.type == "cpu" or not torch.is_grad_enabled() else NEVER


def is_compared(compares: int, is_followed: bool) -> bool:
    """Return whether a call under this condition compares, given whether an optimizer is known to step the weight."""
    return compares == ALWAYS or (compares == UNTIL_FOLLOWED and not is_followed)


@custom_op("nmcompile::refresh_mask", mutates_args=("mask", "clock"))
def refresh_mask(
    weight: Tensor,
    mask: Tensor,
    clock: Tensor,
    operator: str,
    pattern: str,
    out_dim: int,
    in_dim: int,
    groups: int,
    kernel: str,
    is_steady: bool,
    compares: int,
) -> None:
    """Rebuild `mask` from `weight` if it is outdated; `compares` says when to detect that by a fingerprint.

    After optimizer steps, a steady mask is rebuilt from what it was; after a write every mask is rebuilt anew.
    """
    content = fingerprint(weight) if is_compared(compares, bool(clock[FOLLOWED])) else None
    staleness = staleness_of(weight, clock, content)
    if staleness != HOLDS:
        ranked = discounted(weight, mask) if is_steady and staleness == STEPPED else weight
        mask.copy_(compute_mask(ranked, operator, NMPattern.parse(pattern), out_dim, in_dim, groups, kernel))
        clock[STALE], clock[CONTENT] = HOLDS, UNKNOWN
        if tells_writes(weight, clock):
            clock[VERSION], clock[ADDRESS] = weight._version, weight.data_ptr()
    if content is not None:
        clock[CONTENT] = content
        if tells_writes(weight, clock):
            clock[VERSION], clock[ADDRESS] = weight._version, weight.data_ptr()


def compute_mask(
    weight: Tensor, operator: str, pattern: NMPattern, out_dim: int, in_dim: int, groups: int, kernel: str = ""
) -> Tensor:
    """Compute the mask of a weight: row-wise along `in_dim`, or transposable over tiles (out, in) inside each group.

    `kernel` names an operator, `"namespace::name"`, that computes such masks bit for bit, see `_by_kernel`. It is a
    name because it has to be saved, and traced by `torch.compile`.
    """
    if operator == "greedy":
        if kernel:
            return _by_kernel(kernel, weight, operator, pattern.n_keep, pattern.block, in_dim)
        return greedy_mask(weight, pattern, dim=in_dim)
    split = weight.unflatten(out_dim, (groups, -1))
    dims = out_dim + 1, in_dim + (in_dim > out_dim)
    if kernel:
        mask = _by_kernel(kernel, split, *dims)
    else:
        method = "exact" if operator == "transposable" else "greedy"
        mask = transposable_mask(split, pattern, dims=dims, method=method)
    return mask.flatten(out_dim, out_dim + 1)


def _by_kernel(kernel: str, weight: Tensor, *rule: str | int) -> Tensor:
    """Return the mask by a kernel that takes the operator, N, M and a dim, or the two dims of a tile."""
    namespace, _, name = kernel.partition("::")
    mask: Tensor = getattr(getattr(torch.ops, namespace), name)(weight, *rule)
    return mask
