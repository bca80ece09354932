"""The three GEMMs of a transposed convolution, with PyTorch's own convolution kernels."""

import torch
from torch import Tensor
from torch.nn import functional as F

Ints = list[int]
_FORWARD = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv_transpose_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    output_padding: Ints,
) -> Tensor:
    """Compute Y, the input gradient of the convolution whose result is X, plus b: `(N, C, *spatial)`."""
    return _FORWARD[len(stride)](input, weight, bias, stride, padding, output_padding, 1, dilation)


def conv_transpose_input_gradient(
    grad_output: Tensor,
    weight: Tensor,
    input: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    output_padding: Ints,
) -> Tensor:
    """Compute dX = dY * W; `input` gives its shape and memory format."""
    wanted = True, False, False
    return _backward(grad_output, input, weight, stride, padding, dilation, output_padding, wanted)[0]


def conv_transpose_weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    output_padding: Ints,
) -> Tensor:
    """Compute dW; `weight` gives its shape and memory format."""
    wanted = False, True, False
    return _backward(grad_output, input, weight, stride, padding, dilation, output_padding, wanted)[1]


def conv_transpose_parameter_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    output_padding: Ints,
) -> tuple[Tensor, Tensor]:
    """Compute dW and db by one kernel, as eager does if dY is not pruned."""
    wanted = False, True, True
    gradients = _backward(grad_output, input, weight, stride, padding, dilation, output_padding, wanted)
    return gradients[1], gradients[2]


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    output_padding: Ints,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    bias_sizes, geometry = [weight.shape[1]] if wanted[2] else None, (stride, padding, dilation)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad_output, input, weight, bias_sizes, *geometry, True, output_padding, 1, list(wanted)
    )
    return gradients
