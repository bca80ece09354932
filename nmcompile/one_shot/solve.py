"""One layer: from its weight and the Hessian of its inputs to a pruned weight, its mask, and the error left."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nmcompile.checks import check_choice
from nmcompile.errors import CalibrationError, OperandError
from nmcompile.ir.layers import Layer
from nmcompile.one_shot.admm import admm
from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.matrices import as_matrices, from_matrices
from nmcompile.one_shot.refit import refit as refit_weights
from nmcompile.one_shot.refit_on_grid import refit_on_grid
from nmcompile.one_shot.rounding import Round, Rounding, exactly
from nmcompile.one_shot.select import Selector
from nmcompile.one_shot.sparsegpt import round_kept, sparsegpt
from nmcompile.one_shot.wanda import magnitude, wanda
from nmcompile.pruning.pattern import NMPattern

Method = Callable[[Tensor, Hessian, Selector, Round], tuple[Tensor, Tensor]]
"""(weights `(groups, rows, columns)`, Hessian, selector, rounding) -> pruned weights and mask."""

METHODS: dict[str, Method] = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt, "admm": admm}
REFITTING = "admm"  # the method whose weights are refitted in any case


@dataclass(frozen=True)
class Solution:
    """A pruned layer.

    Args:
        weight: of the shape, dtype, device and strides of the layer's weight; exactly zero off the mask. It is on the
            grid, if there is one, unless the method keeps the weights as they are.
        mask: bool, of the same shape and strides.
        error: ||X (W - W')ᵀ|| / ||X Wᵀ|| over the calibration data, in Frobenius norms, with W' on the grid.
    """

    weight: Tensor
    mask: Tensor
    error: float


@torch.no_grad()
def solve(
    method: str,
    layer: Layer,
    weight: Tensor,
    hessian: Hessian,
    pattern: NMPattern,
    is_transposable: bool,
    refit: bool = False,
    rounding: Rounding | None = None,
) -> Solution:
    """Prune a layer's weight.

    Args:
        method: one of `METHODS`.
        layer: the layer; blocks of the pattern divide its channels.
        weight: its dense weight.
        hessian: of its inputs.
        pattern: N:M along in-channels.
        is_transposable: whether the mask is N:M along out-channels too.
        refit: whether the kept weights are set to their least-squares values in the end, the best found on the grid
            if there is one.
        rounding: the grid of a quantized weight. `"sparsegpt"` makes up for what rounding changes as for what is
            pruned.

    Raises:
        ConfigError: the method is unknown.
        OperandError: the pattern does not divide the layer's channels.
        CalibrationError: no input was seen, or one that is not finite.
    """
    check_choice("method", method, METHODS)
    _check_fit(layer, pattern, is_transposable)
    _check_data(layer, hessian)
    dense = as_matrices(layer, weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))
    round = exactly if rounding is None else rounding.of(layer)
    pruned, mask = METHODS[method](dense, hessian, Selector(pattern, is_transposable), round)
    if rounding is not None and (refit or method == REFITTING):
        rounded = round_kept(dense, mask, hessian, round)
        pruned = refit_on_grid(dense, mask, hessian.damped().to(dense.dtype), rounded, round)
    elif refit:
        pruned = refit_weights(dense, mask, hessian.damped().to(dense.dtype), pruned)
    result = torch.empty_like(weight).copy_(from_matrices(layer, pruned * mask))
    left = round(as_matrices(layer, result.to(dense.dtype)))
    kept = torch.empty_like(weight, dtype=torch.bool).copy_(from_matrices(layer, mask))
    return Solution(result, kept, _relative_error(dense, left, hessian.mean().to(dense.dtype)))


def _relative_error(dense: Tensor, pruned: Tensor, mean: Tensor) -> float:
    change = dense - pruned
    lost, whole = (((w @ mean) * w).sum().double().clamp(min=0) for w in (change, dense))
    return float((lost / whole).sqrt()) if lost > 0 else 0.0


def _check_fit(layer: Layer, pattern: NMPattern, is_transposable: bool) -> None:
    if not layer.fits_forward(pattern) or (is_transposable and not layer.fits_backward(pattern)):
        kind = "transposable " if is_transposable else ""
        raise OperandError(
            f"layer {layer.name!r}: its weight of shape {layer.weight_shape} in {layer.groups} group(s) has channels "
            f"that {kind}{pattern} blocks do not divide; leave it dense"
        )


def _check_data(layer: Layer, hessian: Hessian) -> None:
    if not hessian.tokens:
        raise CalibrationError(f"layer {layer.name!r}: no calibration input reached it; give data that runs it")
    if not hessian.is_finite:
        raise CalibrationError(
            f"layer {layer.name!r}: its calibration inputs hold NaN or infinity, or overflow float32; clean the data"
        )
