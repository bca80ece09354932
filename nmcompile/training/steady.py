"""The steady rule: masks that follow the weights in small, well-founded changes.

While a weight is pruned, nothing answers to its value: it drifts as the straight-through gradient says, and passes the
kept ones it competes with for a moment or by a little. A mask that takes each such change replaces trained weights by
untrained ones. A steady mask is rebuilt every few steps, with the magnitude of pruned weights discounted, so a change
has to gain enough to be made.
"""

import torch
from torch import Tensor

PERIOD = 4  # optimizer steps; a rebuild takes 2 % of a step, or more if the batch is small (benchmarks/refresh.py)
DISCOUNT = 0.75  # factor on the magnitude of pruned weights


def period_of(refresh: int | str | None) -> int | None:
    """Return the optimizer steps between two rebuilds under `CompileConfig.refresh`, None if there are none."""
    return PERIOD if isinstance(refresh, str) else refresh


def discounted(weight: Tensor, mask: Tensor) -> Tensor:
    """Return the weight with the elements that `mask` prunes scaled by `DISCOUNT`, in its dtype.

    The N:M mask of the result keeps the most of Σ|w|, where a pruned element counts 3/4.
    """
    dense = weight.detach()
    # On a CPU `torch.where` branches at each element, and no processor can predict a mask; factors 3/4 and 1 are exact.
    factor = torch.empty_like(dense).copy_(mask)
    return factor.mul_(1 - DISCOUNT).add_(DISCOUNT).mul_(dense)
