"""The three GEMMs of a linear layer as in the reference backend, by the sparse or by the dense kernel.

The pruned operand is dense with zeros. `slot` is the name of the slot in which the node keeps its choice.
"""

import torch
from torch import Tensor

from nmcompile.backends.cpu.gemm import (
    Geometry,
    masked,
    sparse_backward,
    sparse_forward,
    sparse_pruned_update,
    sparse_update,
)
from nmcompile.backends.cpu.gemm_call import AT_REST, GemmCall, keep
from nmcompile.backends.cpu.packed_weights import kept_packs
from nmcompile.backends.cpu.prune import prune_natively, runs_natively
from nmcompile.backends.reference import linear
from nmcompile.custom_op import ANY_STRIDES, custom_op
from nmcompile.ir.choice import Choice
from nmcompile.pruning.pattern import NMPattern
from nmcompile.spare_memory import empty
from nmcompile.weight_cache import are_weights_at_rest

GEOMETRY = Geometry()


def empty_output(input: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return empty(input, torch.empty(*input.shape[:-1], weight.shape[1 if transposed else 0], device="meta"))


def _empty_input_gradient(grad_output: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return empty_output(grad_output, weight, not transposed)


def _empty_weight_gradient(grad_output: Tensor, input: Tensor, transposed: bool) -> Tensor:
    sizes = grad_output.shape[-1], input.shape[-1]
    return input.new_empty(sizes[::-1] if transposed else sizes)


def dense_forward(
    input: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, transposed: bool, slot: str = ""
) -> Tensor:
    return linear.linear_forward(input, masked(weight, mask), bias, transposed).contiguous()


def _dense_input_gradient(
    grad_output: Tensor, weight: Tensor, mask: Tensor | None, transposed: bool, slot: str
) -> Tensor:
    return linear.linear_input_gradient(grad_output, masked(weight, mask), transposed)


def _dense_weight_gradient(
    grad_output: Tensor, input: Tensor, transposed: bool, axis: str, block: int, slot: str
) -> Tensor:
    return linear.linear_weight_gradient(grad_output, input, transposed)


def _dense_pruned_weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    operator: str,
    n_keep: int,
    block: int,
    axis: str,
    key: Tensor | None,
    transposed: bool,
    slot: str,
) -> Tensor:
    pruned = prune_natively(grad_output, operator, n_keep, block, axis, -1, key)
    return linear.linear_weight_gradient(pruned, input, transposed)


@custom_op("nmcompile::cpu_linear_forward", fake=empty_output, settled=dense_forward, tags=ANY_STRIDES)
def linear_forward(
    input: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, transposed: bool, slot: str
) -> Tensor:
    """Compute Y = X Wᵀ + b, `(..., in)` to `(..., out)`, with W pruned along in-features."""
    return keep(slot, choose_forward(input, weight, mask, bias, transposed))


def choose_forward(
    input: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, transposed: bool
) -> tuple[Tensor, Choice]:
    """Return the output, and the choice of the kernel that computed it."""
    matrix, kept = _matrix(weight, mask, transposed)
    phase = AT_REST if are_weights_at_rest() else "forward"
    gemm = GemmCall(phase, GEOMETRY, (input, matrix, mask, bias), *_sizes(matrix), _rows(input))
    return gemm.run(
        lambda: empty_output(input, weight, transposed),
        lambda output: sparse_forward(input, matrix, kept, bias, output, GEOMETRY, kept_packs(weight, mask)),
        lambda: dense_forward(input, weight, mask, bias, transposed),
    )


@custom_op(
    "nmcompile::cpu_linear_input_gradient",
    fake=_empty_input_gradient,
    settled=_dense_input_gradient,
    tags=ANY_STRIDES,
)
def linear_input_gradient(
    grad_output: Tensor, weight: Tensor, mask: Tensor | None, transposed: bool, slot: str
) -> Tensor:
    """Compute dX = dY W, `(..., out)` to `(..., in)`, with W pruned along out-features."""
    matrix, kept = _matrix(weight, mask, transposed)
    gemm = GemmCall("backward", GEOMETRY, (grad_output, matrix, mask), *_sizes(matrix.t()), _rows(grad_output))
    outcome = gemm.run(
        lambda: _empty_input_gradient(grad_output, weight, transposed),
        lambda gradient: sparse_backward(grad_output, matrix, kept, gradient, GEOMETRY),
        lambda: _dense_input_gradient(grad_output, weight, mask, transposed, slot),
    )
    return keep(slot, outcome)


@custom_op(
    "nmcompile::cpu_linear_weight_gradient",
    fake=_empty_weight_gradient,
    settled=_dense_weight_gradient,
    tags=ANY_STRIDES,
)
def linear_weight_gradient(
    grad_output: Tensor, input: Tensor, transposed: bool, axis: str, block: int, slot: str
) -> Tensor:
    """Compute dW = dYᵀ X, shaped like W, with dY pruned along `axis` in blocks (see `nmcompile.ir.grouping`)."""

    def fill(gradient: Tensor) -> bool:
        matrix = gradient.t() if transposed else gradient
        return sparse_update(grad_output, input, matrix, GEOMETRY, axis, block)

    size = grad_output.shape[-1], _rows(input), input.shape[-1]
    outcome = GemmCall("update", GEOMETRY, (grad_output, input), *size).run(
        lambda: _empty_weight_gradient(grad_output, input, transposed),
        fill,
        lambda: _dense_weight_gradient(grad_output, input, transposed, axis, block, slot),
    )
    return keep(slot, outcome)


@custom_op(
    "nmcompile::cpu_linear_pruned_weight_gradient",
    fake=_empty_weight_gradient,
    settled=_dense_pruned_weight_gradient,
    tags=ANY_STRIDES,
)
def linear_pruned_weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    operator: str,
    n_keep: int,
    block: int,
    axis: str,
    key: Tensor | None,
    transposed: bool,
    slot: str,
) -> Tensor:
    """Compute dW = dYᵀ X with dY as `prune_natively` would prune it; the sparse kernel prunes while packing."""
    pattern = NMPattern(n_keep, block)
    is_flat = axis != "batch" or grad_output.dim() == 2

    def pruned() -> Tensor:
        return prune_natively(grad_output, operator, n_keep, block, axis, -1, key)

    def fill(gradient: Tensor) -> bool:
        matrix = gradient.t() if transposed else gradient
        tokens = grad_output.flatten(0, -2)
        if is_flat and tokens.stride(1) == 1 and runs_natively(tokens, operator, pattern, 0, key, relu=False):
            return sparse_pruned_update(tokens, input.flatten(0, -2), matrix, operator, pattern, key)
        return sparse_update(pruned(), input, matrix, GEOMETRY, axis, block)

    size = grad_output.shape[-1], _rows(input), input.shape[-1]
    outcome = GemmCall(f"update, {operator} {pattern}", GEOMETRY, (grad_output, input), *size).run(
        lambda: _empty_weight_gradient(grad_output, input, transposed),
        fill,
        lambda: _dense_pruned_weight_gradient(grad_output, input, operator, n_keep, block, axis, key, transposed, slot),
    )
    return keep(slot, outcome)


def _matrix(weight: Tensor, mask: Tensor | None, transposed: bool) -> tuple[Tensor, Tensor | None]:
    """Return weight and mask as `(out, in)`."""
    if not transposed:
        return weight, mask
    return weight.t(), None if mask is None else mask.t()


def _sizes(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel()
