"""The three GEMMs of a convolution, with PyTorch's own convolution kernels: no im2col."""

import torch
from torch import Tensor
from torch.nn import functional as F

Ints = list[int]
_FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """Compute Y = X * W + b, `(N, C, *spatial)`."""
    return _FORWARD[len(stride)](input, weight, bias, stride, padding, dilation, groups)


def conv_input_gradient(
    grad_output: Tensor, weight: Tensor, input: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """Compute dX; `input` gives its shape and memory format."""
    return _backward(grad_output, input, weight, stride, padding, dilation, groups, (True, False, False))[0]


def conv_weight_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """Compute dW; `weight` gives its shape and memory format."""
    return _backward(grad_output, input, weight, stride, padding, dilation, groups, (False, True, False))[1]


def conv_parameter_gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> tuple[Tensor, Tensor]:
    """Compute dW and db by one kernel, as eager does if dY is not pruned."""
    gradients = _backward(grad_output, input, weight, stride, padding, dilation, groups, (False, True, True))
    return gradients[1], gradients[2]


def conv_bias_gradient(grad_output: Tensor) -> Tensor:
    """Compute db, the sum over samples and positions."""
    return grad_output.sum([0, *range(2, grad_output.dim())])


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad_output,
        input,
        weight,
        [weight.shape[0]] if wanted[2] else None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        list(wanted),
    )
    return gradients
