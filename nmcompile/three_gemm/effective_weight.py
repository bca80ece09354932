"""The weight as the forward GEMM reads it."""

import torch
from torch import Tensor, nn

from nmcompile.fingerprint import fingerprint
from nmcompile.ir.operations import apply_mask, to_grid
from nmcompile.three_gemm.stored_weights import stored_weight
from nmcompile.three_gemm.triple import GemmTriple


@torch.no_grad()
def effective_weight(model: nn.Module, triple: GemmTriple) -> Tensor | None:
    """Return the weight as the forward GEMM reads it; None if it is computed inside a forward."""
    weight = stored_weight(model, triple.site)
    if weight is None:
        return None
    # A computed mask would signal that its layer ran.
    mask = triple.mask
    if mask is None:
        pruned = weight
    else:
        found = mask.current(weight, fingerprint(weight)) if triple.called else mask.preview(weight)
        pruned = apply_mask(weight, found)
    step, grid = triple.steps.of_weight(weight), triple.steps.weight_grid
    return pruned if step is None or grid is None else to_grid(pruned, step, grid.bits, grid.signed)
