"""The three GEMMs of a convolution as in the reference backend, by the sparse or by the dense kernel.

The pruned operand is dense with zeros. `slot` is the name of the slot in which the node keeps its choice.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from nmcompile.backends.cpu.gemm import Geometry, masked, sparse_backward, sparse_forward, sparse_update
from nmcompile.backends.cpu.gemm_call import AT_REST, GemmCall, keep
from nmcompile.backends.cpu.packed_weights import kept_packs
from nmcompile.backends.reference import conv
from nmcompile.custom_op import ANY_STRIDES, custom_op
from nmcompile.ir.operations import like
from nmcompile.spare_memory import empty, empty_like
from nmcompile.weight_cache import are_weights_at_rest

Ints = Sequence[int]
Layout = tuple[torch.Size, tuple[int, ...]]
"""Sizes and strides of a tensor."""
SHAPES = 1024  # results whose sizes and strides are cached


def _dense_forward(
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
    output = conv.conv_forward(input, masked(weight, mask), bias, list(stride), list(padding), list(dilation), groups)
    shape = _known_shape(
        _layout(input), _layout(weight), Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    )
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


@custom_op(
    "nmcompile::cpu_conv_forward",
    tags=ANY_STRIDES,
    settled=_dense_forward,
    fake=lambda input, weight, stride, padding, dilation, groups: empty(
        input, _output_shape(input, weight, Geometry(stride, padding, dilation, groups))
    ),
)
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
    shape = _known_shape(_layout(input), _layout(weight), geometry)
    lanes = shape.numel() // max(1, shape.shape[1])
    phase = AT_REST if are_weights_at_rest() else "forward"
    gemm = GemmCall(phase, geometry, (input, weight, mask, bias), *_matrix(weight, groups), lanes)
    outcome = gemm.run(
        lambda: empty(input, shape),
        lambda output: sparse_forward(input, weight, mask, bias, output, geometry, kept_packs(weight, mask, groups)),
        lambda: _dense_forward(input, weight, mask, bias, stride, padding, dilation, groups, slot),
    )
    return keep(slot, outcome)


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
    out, depth = _matrix(weight, groups)
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
    rows, lanes = _matrix(weight, groups)
    positions = grad_output.shape[0] * grad_output.shape[2:].numel()
    outcome = GemmCall("update", geometry, (grad_output, input, weight), rows, positions, lanes).run(
        lambda: torch.empty_like(weight),
        lambda gradient: sparse_update(grad_output, input, gradient, geometry, axis, block),
        lambda: _dense_weight_gradient(
            grad_output, input, weight, stride, padding, dilation, groups, axis, block, slot
        ),
    )
    return keep(slot, outcome)


def _matrix(weight: Tensor, groups: int) -> tuple[int, int]:
    """Return rows and columns of one group's weight as a matrix."""
    return weight.shape[0] // groups, weight.shape[1:].numel()


def _output_shape(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return a meta tensor with the result's sizes and strides, which are those of eager's convolution.

    Eager computes a 1-d convolution as a 2-d one of height 1, and reads its input as a contiguous one.
    """
    spans = zip(input.shape[2:], weight.shape[2:], *geometry[:3], strict=True)
    sizes = [(size + 2 * pad - dilation * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, dilation in spans]
    if len(sizes) == 1:
        image = [input.shape[0], weight.shape[0], 1, *sizes]
        return _empty_image(image, _is_channels_last(weight.unsqueeze(2))).squeeze(2)
    is_channels_last = any(_is_channels_last(x) for x in (input, weight))
    return _empty_image([input.shape[0], weight.shape[0], *sizes], is_channels_last)


def _layout(x: Tensor) -> Layout:
    return x.shape, x.stride()


@lru_cache(SHAPES)
def _known_shape(input: Layout, weight: Layout, geometry: Geometry) -> Tensor:
    """Return `_output_shape`, which takes as long as all else that a call of a small layer has to find out."""
    x, w = (torch.empty_strided(*layout, device="meta") for layout in (input, weight))
    return _output_shape(x, w, geometry)


def _empty_image(sizes: list[int], is_channels_last: bool) -> Tensor:
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    return torch.empty(sizes, device="meta", memory_format=layout)


def _is_channels_last(x: Tensor) -> bool:
    """Return whether eager takes an operand for channels last: strides decide if dims of size 1 leave it open."""
    if x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return False  # the usual case, without arithmetic on strides
    return suggest_memory_format(x) == torch.channels_last
