"""Forward and backward GEMMs of linear layers and 1x1 convolutions as torch operators.

The weight is dense with its zeros. `call` names the node that calls. What the library does not take runs as the
reference backend has it.
"""

import torch
from torch import Tensor

from nmcompile.backends.cusparselt.product import Product, by_channels, by_rows, run_product
from nmcompile.backends.reference import conv, linear


@torch.library.custom_op("nmcompile::cusparselt_linear_forward", mutates_args=())
def _linear_forward(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, call: str) -> Tensor:
    """Y = X Wᵀ + b, `(..., in)` to `(..., out)`, with W 2:4 along in-features."""
    matrix = weight.t() if transposed else weight
    return run_product(
        Product(call, matrix, by_rows(input, -1), bias),
        lambda rows: rows.view(*input.shape[:-1], matrix.shape[0]),
        lambda: linear.linear_forward(input, weight, bias, transposed).contiguous(),
    )


@_linear_forward.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, call: str) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[1 if transposed else 0])


@torch.library.custom_op("nmcompile::cusparselt_linear_input_gradient", mutates_args=())
def _linear_input_gradient(grad_output: Tensor, weight: Tensor, transposed: bool, call: str) -> Tensor:
    """dX = dY W, `(..., out)` to `(..., in)`, with W 2:4 along out-features."""
    matrix = weight if transposed else weight.t()
    return run_product(
        Product(call, matrix, by_rows(grad_output, -1)),
        lambda rows: rows.view(*grad_output.shape[:-1], matrix.shape[0]),
        lambda: linear.linear_input_gradient(grad_output, weight, transposed),
    )


@_linear_input_gradient.register_fake
def _(grad_output: Tensor, weight: Tensor, transposed: bool, call: str) -> Tensor:
    return grad_output.new_empty(*grad_output.shape[:-1], weight.shape[0 if transposed else 1])


@torch.library.custom_op("nmcompile::cusparselt_pointwise_forward", mutates_args=())
def _pointwise_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: str,
) -> Tensor:
    """Y = X * W + b for a 1x1 convolution, with W 2:4 along in-channels."""
    return run_product(
        Product(call, weight.flatten(1), by_rows(input, 1), bias),
        lambda rows: by_channels(rows, input, weight.shape[0]),
        lambda: conv.conv_forward(input, weight, bias, *_geometry(input)),
    )


@_pointwise_forward.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: str,
) -> Tensor:
    rows = input.new_empty(input.numel() // input.shape[1], weight.shape[0])
    return by_channels(rows, input, weight.shape[0])


@torch.library.custom_op("nmcompile::cusparselt_pointwise_input_gradient", mutates_args=())
def _pointwise_input_gradient(
    grad_output: Tensor,
    weight: Tensor,
    input: Tensor,
    call: str,
) -> Tensor:
    """dX of a 1x1 convolution, with W 2:4 along out-channels; in the memory format of `input`."""
    return run_product(
        Product(call, weight.flatten(1).t(), by_rows(grad_output, 1)),
        lambda rows: by_channels(rows, input, weight.shape[1]),
        lambda: conv.conv_input_gradient(grad_output, weight, input, *_geometry(input)),
    )


@_pointwise_input_gradient.register_fake
def _(
    grad_output: Tensor,
    weight: Tensor,
    input: Tensor,
    call: str,
) -> Tensor:
    return by_channels(input.new_empty(input.numel() // input.shape[1], input.shape[1]), input, input.shape[1])


linear_forward = torch.ops.nmcompile.cusparselt_linear_forward.default
linear_input_gradient = torch.ops.nmcompile.cusparselt_linear_input_gradient.default
pointwise_forward = torch.ops.nmcompile.cusparselt_pointwise_forward.default
pointwise_input_gradient = torch.ops.nmcompile.cusparselt_pointwise_input_gradient.default


def _geometry(input: Tensor) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups of a 1x1 convolution."""
    dims = input.dim() - 2
    return [1] * dims, [0] * dims, [1] * dims, 1
