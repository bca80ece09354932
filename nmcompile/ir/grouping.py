"""Views of a GEMM operand in which the pruning operators find its blocks."""

from collections.abc import Callable

from torch import Tensor

Grouped = tuple[Tensor, int, Callable[[Tensor], Tensor]]


def grouped(x: Tensor, axis: str, channel_dim: int, block: int) -> Grouped:
    """Return the operand as the operators take it: a tensor, the dim along which blocks run, and the inverse view.

    Args:
        x: `(tokens..., features)` with `channel_dim=-1` (linear), or `(samples, channels, *spatial)` with
            `channel_dim=1` (conv).
        axis: `"channels"`; `"batch"`, across the samples at each position; `"flat"`, along the flattened contraction
            index of the update GEMM; `"auto"`, batch for a conv whose batch divides by `block`, else flat.
        channel_dim: see `x`.
        block: M of the pattern; it decides what `"auto"` means.
    """
    if axis == "auto":
        axis = "batch" if channel_dim == 1 and x.shape[0] % block == 0 else "flat"
    if axis == "channels":
        return x, channel_dim, lambda y: y
    if axis == "batch" or x.dim() == 2:
        return x, 0, lambda y: y
    if channel_dim == 1:
        rest = (x.shape[0], *x.shape[2:])
        return x.transpose(0, 1).flatten(1), 1, lambda y: y.unflatten(1, rest).transpose(0, 1)
    return x.flatten(0, -2), 0, lambda y: y.reshape(x.shape)
