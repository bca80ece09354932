"""The three GEMMs of a transposed convolution of one group, with PyTorch's own convolution kernels.

`geometry` is stride, padding, dilation and output padding, each with a number for each spatial dimension.
"""

from torch import Tensor
from torch.nn import functional as F

from nmcompile.backends.reference.conv import Ints, gradients

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


def conv_transpose_input_gradient(grad_output: Tensor, weight: Tensor, input: Tensor, *geometry: Ints) -> Tensor:
    """Compute dX = dY * W; `input` gives its shape and memory format."""
    return _gradients(grad_output, input, weight, (True, False, False), *geometry)[0]


def conv_transpose_weight_gradient(grad_output: Tensor, input: Tensor, weight: Tensor, *geometry: Ints) -> Tensor:
    """Compute dW; `weight` gives its shape and memory format."""
    return _gradients(grad_output, input, weight, (False, True, False), *geometry)[1]


def conv_transpose_parameter_gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, *geometry: Ints
) -> tuple[Tensor, Tensor]:
    """Compute dW and db by one kernel, as eager does if dY is not pruned."""
    return _gradients(grad_output, input, weight, (False, True, True), *geometry)[1:]


def _gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool], *geometry: Ints
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, output_padding = geometry
    return gradients(grad_output, input, weight, wanted, stride, padding, dilation, 1, output_padding)
