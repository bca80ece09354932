"""The three GEMMs of a convolution as in the reference backend, by the sparse or by the dense kernel.

The pruned operand is dense with zeros. `slot` is the name of the slot in which the node keeps its choice.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from nmcompile.backends.cpu.gemm import Geometry, masked, sparse_backward, sparse_forward, sparse_update
from nmcompile.backends.cpu.gemm_call import AT_REST, GemmCall, keep
from nmcompile.backends.cpu.packed_weights import kept_packs
from nmcompile.backends.reference import conv
from nmcompile.custom_op import ANY_STRIDES, custom_op
from nmcompile.ir.choice import Choice
from nmcompile.ir.conv_result import conv_result
from nmcompile.ir.operations import like
from nmcompile.spare_memory import empty, empty_like
from nmcompile.weight_cache import are_weights_at_rest

Ints = Sequence[int]
Layout = tuple[torch.Size, tuple[int, ...]]
"""Sizes and strides of a tensor."""
SHAPES = 1024  # results whose sizes and strides are cached


def dense_forward(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    slot: str = "",
) -> Tensor:
    output = conv.conv_forward(input, masked(weight, mask), bias, list(stride), list(padding), list(dilation), groups)
    shape = result_shape(input, weight, Geometry(tuple(stride), tuple(padding), tuple(dilation), groups))
    as_expected = output.stride() == shape.stride() or not output.numel()
    return output if as_expected else empty(input, shape).copy_(output)


def _dense_input_gradient(
    grad_output: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    input: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    slot: str,
) -> Tensor:
    lists = list(stride), list(padding), list(dilation)
    return like(conv.conv_input_gradient(grad_output, masked(weight, mask), input, *lists, groups), input)


def _dense_weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    axis: str,
    block: int,
    slot: str,
) -> Tensor:
    lists = list(stride), list(padding), list(dilation)
    return like(conv.conv_weight_gradient(grad_output, input, weight, *lists, groups), weight)


def empty_output(input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> Tensor:
    return empty(input, conv_result(input, weight, stride, padding, dilation))


@custom_op("nmcompile::cpu_conv_forward", tags=ANY_STRIDES, settled=dense_forward, fake=empty_output)
def conv_forward(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    slot: str,
) -> Tensor:
    """Compute Y = X * W + b, `(N, C, *spatial)`, with W pruned along in-channels; channels last if X or W is."""
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    return keep(slot, choose_forward(input, weight, mask, bias, geometry))


def choose_forward(
    input: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Choice]:
    """Return the output, and the choice of the kernel that computed it."""
    shape = result_shape(input, weight, geometry)
    phase = AT_REST if are_weights_at_rest() else "forward"
    gemm = GemmCall(phase, geometry, (input, weight, mask, bias), *matrix(weight, geometry.groups), positions_of(shape))
    return gemm.run(
        lambda: empty(input, shape),
        lambda output: sparse_forward(
            input, weight, mask, bias, output, geometry, kept_packs(weight, mask, geometry.groups)
        ),
        lambda: dense_forward(input, weight, mask, bias, *geometry),
    )


@custom_op(
    "nmcompile::cpu_conv_input_gradient",
    tags=ANY_STRIDES,
    settled=_dense_input_gradient,
    fake=lambda input: torch.empty_like(input),
)
def conv_input_gradient(
    grad_output: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    input: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    slot: str,
) -> Tensor:
    """Compute dX, with W pruned along out-channels; `input` gives its shape and memory format."""
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    out, depth = matrix(weight, groups)
    kernel = depth // weight.shape[1]
    # A position of the input meets one of `stride` taps in each direction, on average.
    lanes = grad_output.shape[0] * grad_output.shape[2:].numel()
    gemm = GemmCall("backward", geometry, (grad_output, weight, mask), weight.shape[1], out * kernel, lanes)
    outcome = gemm.run(
        lambda: empty_like(input),
        lambda gradient: sparse_backward(grad_output, weight, mask, gradient, geometry),
        lambda: _dense_input_gradient(grad_output, weight, mask, input, stride, padding, dilation, groups, slot),
    )
    return keep(slot, outcome)


@custom_op(
    "nmcompile::cpu_conv_weight_gradient",
    tags=ANY_STRIDES,
    settled=_dense_weight_gradient,
    fake=lambda weight: torch.empty_like(weight),
)
def conv_weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    axis: str,
    block: int,
    slot: str,
) -> Tensor:
    """Compute dW, with dY pruned along `axis` in blocks (see `nmcompile.ir.grouping`); `weight` gives the format."""
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    rows, lanes = matrix(weight, groups)
    positions = grad_output.shape[0] * grad_output.shape[2:].numel()
    outcome = GemmCall("update", geometry, (grad_output, input, weight), rows, positions, lanes).run(
        lambda: torch.empty_like(weight),
        lambda gradient: sparse_update(grad_output, input, gradient, geometry, axis, block),
        lambda: _dense_weight_gradient(
            grad_output, input, weight, stride, padding, dilation, groups, axis, block, slot
        ),
    )
    return keep(slot, outcome)


def matrix(weight: Tensor, groups: int) -> tuple[int, int]:
    """Return rows and columns of one group's weight as a matrix."""
    return weight.shape[0] // groups, weight.shape[1:].numel()


def positions_of(shape: Tensor) -> int:
    """Return the output positions of all samples together."""
    return shape.numel() // max(1, shape.shape[1])


def result_shape(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return a meta tensor with the sizes and strides of the result."""
    return known_shape(layout_of(input), layout_of(weight), geometry)


def layout_of(x: Tensor) -> Layout:
    return x.shape, x.stride()


@lru_cache(SHAPES)
def known_shape(input: Layout, weight: Layout, geometry: Geometry) -> Tensor:
    """Return the cached `conv_result`, which takes as long as all else that a call of a small layer has to find out."""
    x, w = (torch.empty_strided(*layout, device="meta") for layout in (input, weight))
    return conv_result(x, w, *geometry[:3])
