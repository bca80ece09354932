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
    return gradients(grad_output, input, weight, (True, False, False), stride, padding, dilation, groups)[0]


def conv_weight_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """Compute dW; `weight` gives its shape and memory format."""
    return gradients(grad_output, input, weight, (False, True, False), stride, padding, dilation, groups)[1]


def conv_parameter_gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> tuple[Tensor, Tensor]:
    """Compute dW and db by one kernel, as eager does if dY is not pruned."""
    return gradients(grad_output, input, weight, (False, True, True), stride, padding, dilation, groups)[1:]


def conv_bias_gradient(grad_output: Tensor) -> Tensor:
    """Compute db, the sum over samples and positions."""
    return grad_output.sum([0, *range(2, grad_output.dim())])


def gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    wanted: tuple[bool, bool, bool],
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    output_padding: Ints | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute those of dX, dW and db that are wanted, by one kernel, in the memory formats of `input` and `weight`.

    With an output padding the convolution is a transposed one.
    """
    is_transposed = output_padding is not None
    bias = [weight.shape[1 if is_transposed else 0]] if wanted[2] else None
    last = output_padding or [0] * len(stride)
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad_output, input, weight, bias, stride, padding, dilation, is_transposed, last, groups, list(wanted)
    )
    return result
