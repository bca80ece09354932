"""The three GEMMs of a convolution as the reference backend has them, by the sparse or by the dense kernel.

The pruned operand is dense with zeros. `call` names the node that calls.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nmcompile.backends.cpu.gemm import Geometry, masked, sparse_backward, sparse_forward, sparse_update
from nmcompile.backends.cpu.gemm_call import AT_REST, GemmCall
from nmcompile.backends.cpu.packed_weights import kept_packs
from nmcompile.backends.cpu.spare_memory import empty, empty_like
from nmcompile.backends.reference import conv
from nmcompile.ir.at_rest import are_weights_at_rest
from nmcompile.ir.operations import like

Ints = Sequence[int]


@torch.library.custom_op("nmcompile::cpu_conv_forward", mutates_args=())
def _conv_forward(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    call: str,
) -> Tensor:
    """Y = X * W + b, `(N, C, *spatial)`, with W pruned along in-channels; channels last where X or W is."""
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    sizes, layout = _output_sizes(input, weight, geometry), _layout(input, weight)
    lanes = sizes[0] * torch.Size(sizes[2:]).numel()

    def dense() -> Tensor:
        output = conv.conv_forward(input, masked(weight, mask), bias, *_lists(geometry))
        return output.contiguous(memory_format=layout)

    phase = AT_REST if are_weights_at_rest() else "forward"
    gemm = GemmCall(call, phase, geometry, (input, weight, mask, bias), *_matrix(weight, groups), lanes)
    return gemm.run(
        lambda: _empty(input, sizes, layout),
        lambda output: sparse_forward(input, weight, mask, bias, output, geometry, kept_packs(weight, mask, groups)),
        dense,
    )


@_conv_forward.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    call: str,
) -> Tensor:
    sizes = _output_sizes(input, weight, Geometry(stride, padding, dilation, groups))
    return _empty(input, sizes, _layout(input, weight))


@torch.library.custom_op("nmcompile::cpu_conv_input_gradient", mutates_args=())
def _conv_input_gradient(
    grad_output: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    input: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    call: str,
) -> Tensor:
    """dX, with W pruned along out-channels; `input` gives its shape and memory format."""
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    out, depth = _matrix(weight, groups)
    kernel = depth // weight.shape[1]
    # A position of the input meets one of `stride` taps in each direction, on average.
    lanes = grad_output.shape[0] * grad_output.shape[2:].numel()
    gemm = GemmCall(call, "backward", geometry, (grad_output, weight, mask), weight.shape[1], out * kernel, lanes)
    return gemm.run(
        lambda: empty_like(input),
        lambda gradient: sparse_backward(grad_output, weight, mask, gradient, geometry),
        lambda: like(conv.conv_input_gradient(grad_output, masked(weight, mask), input, *_lists(geometry)), input),
    )


@_conv_input_gradient.register_fake
def _(grad_output: Tensor, weight: Tensor, mask: Tensor | None, input: Tensor, *_: object) -> Tensor:
    return torch.empty_like(input)


@torch.library.custom_op("nmcompile::cpu_conv_weight_gradient", mutates_args=())
def _conv_weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    axis: str,
    block: int,
    call: str,
) -> Tensor:
    """dW, with dY pruned along `axis` in blocks (see `nmcompile.ir.grouping`); `weight` gives shape and format."""
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    rows, lanes = _matrix(weight, groups)
    positions = grad_output.shape[0] * grad_output.shape[2:].numel()
    return GemmCall(call, "update", geometry, (grad_output, input, weight), rows, positions, lanes).run(
        lambda: empty_like(weight),
        lambda gradient: sparse_update(grad_output, input, gradient, geometry, axis, block),
        lambda: like(conv.conv_weight_gradient(grad_output, input, weight, *_lists(geometry)), weight),
    )


@_conv_weight_gradient.register_fake
def _(grad_output: Tensor, input: Tensor, weight: Tensor, *_: object) -> Tensor:
    return torch.empty_like(weight)


conv_forward = torch.ops.nmcompile.cpu_conv_forward.default
conv_input_gradient = torch.ops.nmcompile.cpu_conv_input_gradient.default
conv_weight_gradient = torch.ops.nmcompile.cpu_conv_weight_gradient.default


def _empty(x: Tensor, sizes: list[int], layout: torch.memory_format) -> Tensor:
    return empty(x, torch.empty(sizes, device="meta", memory_format=layout))


def _matrix(weight: Tensor, groups: int) -> tuple[int, int]:
    """Rows and columns of one group's weight as a matrix."""
    return weight.shape[0] // groups, weight.shape[1:].numel()


def _output_sizes(input: Tensor, weight: Tensor, geometry: Geometry) -> list[int]:
    spans = zip(input.shape[2:], weight.shape[2:], *geometry[:3], strict=True)
    sizes = [(size + 2 * pad - dilation * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, dilation in spans]
    return [input.shape[0], weight.shape[0], *sizes]


def _layout(input: Tensor, weight: Tensor) -> torch.memory_format:
    """That of eager's convolution: channels last where one of its operands is."""
    return torch.channels_last if any(_is_channels_last(x) for x in (input, weight)) else torch.contiguous_format


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _lists(geometry: Geometry) -> tuple[list[int], list[int], list[int], int]:
    return list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups
