"""The three GEMMs of a linear layer, with eager autograd's operations: results match bit for bit."""

from torch import Tensor
from torch.nn import functional as F


def linear_forward(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute Y = X Wᵀ + b, `(..., in)` to `(..., out)`."""
    return F.linear(input, weight.t() if transposed else weight, bias)


def linear_input_gradient(grad_output: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Compute dX = dY W, `(..., out)` to `(..., in)`."""
    matrix = weight.t() if transposed else weight
    product = grad_output.reshape(-1, grad_output.shape[-1]).mm(matrix)
    return product.view(*grad_output.shape[:-1], matrix.shape[1])


def linear_weight_gradient(grad_output: Tensor, input: Tensor, transposed: bool) -> Tensor:
    """Compute dW = dYᵀ X, `(out, in)`, or `(in, out)` for a transposed weight."""
    rows = grad_output.reshape(-1, grad_output.shape[-1])
    columns = input.reshape(-1, input.shape[-1])
    return columns.t().mm(rows) if transposed else rows.t().mm(columns)


def linear_bias_gradient(grad_output: Tensor, input: Tensor) -> Tensor:
    """Compute db, the sum over all tokens, in the order in which eager sums them."""
    if input.is_contiguous():
        return grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
    return grad_output.sum(list(range(grad_output.dim() - 1)))
