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
from nmcompile.one_shot.rounding import Rounding
from nmcompile.one_shot.select import Selector
from nmcompile.one_shot.solve_on_grid import fit_grid, solve_on_grid
from nmcompile.one_shot.sparsegpt import sparsegpt
from nmcompile.one_shot.wanda import magnitude, wanda
from nmcompile.pruning.pattern import NMPattern

Method = Callable[[Tensor, Hessian, Selector], tuple[Tensor, Tensor]]
"""(weights `(groups, rows, columns)`, Hessian, selector) -> pruned weights and mask."""

METHODS: dict[str, Method] = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt, "admm": admm}
KEEPING = ("magnitude", "wanda")  # methods that leave kept weights as they are, unless these are refitted


@dataclass(frozen=True)
class Solution:
    """A pruned layer.

    Args:
        weight: of the shape, dtype, device and strides of the layer's weight; exactly zero off the mask. It is on the
            grid, if there is one, unless the method keeps the weights as they are.
        mask: bool, of the same shape and strides.
        error: ||X (W - W')ᵀ|| / ||X Wᵀ|| over the calibration data, in Frobenius norms, with W' on the grid. Where X is
            not the dense model's, and the method changes weights, W are those that make up best for what X lacks. Where
            a bias takes up the mean error, X in the first norm is the deviation from its mean.
        step: of the grid, in the shape of the one that was given; None for weights that are not quantized.
        bias: what the layer's bias gains, `(out,)`; None if it stays.
    """

    weight: Tensor
    mask: Tensor
    error: float
    step: Tensor | None
    bias: Tensor | None


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
        rounding: the grid of a quantized weight as it is. Methods that change weights fit its step to those that they
            keep, and make up for what rounding changes as for what is pruned.

    Raises:
        ConfigError: the method is unknown.
        OperandError: the pattern does not divide the layer's channels.
        CalibrationError: no input was seen, or one that is not finite.
    """
    check_choice("method", method, METHODS)
    _check_fit(layer, pattern, is_transposable)
    _check_data(layer, hessian)
    dense = as_matrices(layer, weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))
    choose = Selector(pattern, is_transposable)
    is_kept = keeps_weights(method, refit)
    if is_kept:
        target = dense
        pruned, mask = METHODS[method](dense, hessian, choose)
    else:
        target = hessian.retargeted(dense)
        pruned, mask, rounding = _solve(method, layer, dense, target, hessian, choose, refit, rounding)
    result = torch.empty_like(weight).copy_(from_matrices(layer, pruned * mask))
    kept = torch.empty_like(weight, dtype=torch.bool).copy_(from_matrices(layer, mask))
    left = as_matrices(layer, result.to(dense.dtype))
    left = left if rounding is None else rounding.of(layer)(left)
    moments = hessian.second_moments().to(dense.dtype)
    error = _relative_error(target, left, moments if is_kept else hessian.mean().to(dense.dtype), moments)
    bias = None if is_kept or not hessian.is_centred else hessian.mean_error(dense, left).reshape(-1)
    return Solution(result, kept, error, None if rounding is None else rounding.step, bias)


def keeps_weights(method: str, refit: bool) -> bool:
    """Return whether a method leaves the kept weights, and with them all other parameters, as they are."""
    return method in KEEPING and not refit


def _solve(
    method: str,
    layer: Layer,
    dense: Tensor,
    target: Tensor,
    hessian: Hessian,
    choose: Selector,
    refit: bool,
    rounding: Rounding | None,
) -> tuple[Tensor, Tensor, Rounding | None]:
    """Return weights with new values near a target, their mask, and the grid that they are on."""
    keeps = method in KEEPING
    pruned, mask = METHODS[method](dense if keeps else target, hessian, choose)
    if refit and (keeps or rounding is None):
        pruned = refit_weights(target, mask, hessian.damped().to(target.dtype), pruned)
    if rounding is not None:
        rounding = fit_grid(rounding, pruned, hessian)
        found = choose if method == "sparsegpt" else mask
        pruned, mask = solve_on_grid(layer, target, hessian, found, rounding, refit or method == "admm")
    return pruned, mask, rounding


def _relative_error(dense: Tensor, pruned: Tensor, mean: Tensor, moments: Tensor) -> float:
    lost, whole = (
        ((w @ matrix) * w).sum().double().clamp(min=0) for w, matrix in ((dense - pruned, mean), (dense, moments))
    )
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
