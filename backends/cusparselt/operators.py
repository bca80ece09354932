"""The GEMMs of linear layers and 1x1 convolutions that read a sparse weight, as torch operators.

The weight comes with its mask, or with its zeros. `library` and `slot` are the names of the library that
multiplies and of the slot in which the node keeps its choice. Operands that the library does not take run as in
the reference backend.
"""

from torch import Tensor

from nmcompile.backends.cusparselt.gemm_call import GemmCall, run_call
from nmcompile.backends.cusparselt.kept_weights import kept_for
from nmcompile.backends.cusparselt.library import library_named
from nmcompile.backends.cusparselt.operand import Operand
from nmcompile.backends.cusparselt.product import Product, by_channels, by_rows, memory_format
from nmcompile.backends.reference import conv, linear
from nmcompile.custom_op import ANY_STRIDES, custom_op
from nmcompile.ir.choice_slot import keep


def _empty_output(input: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[1 if transposed else 0])


def _empty_input_gradient(grad_output: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return _empty_output(grad_output, weight, not transposed)


def _empty_image(input: Tensor, channels: int) -> Tensor:
    return by_channels(input.new_empty(input.numel() // input.shape[1], channels), input, channels)


@custom_op("nmcompile::cusparselt_linear_forward", fake=_empty_output)
def linear_forward(
    input: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, transposed: bool, library: str, slot: str
) -> Tensor:
    """Compute Y = X Wᵀ + b, `(..., in)` to `(..., out)`, with W 2:4 along in-features."""
    by = library_named(library)

    def call(weight: Tensor, input: Tensor, bias: Tensor | None) -> GemmCall[Tensor]:
        sparse = Operand(weight, 0 if transposed else 1, mask)
        return GemmCall(
            Product(by, sparse, by_rows(input, -1), bias, weight=weight),
            lambda rows: rows.view(*input.shape[:-1], sparse.rows),
            lambda: linear.linear_forward(input, kept_for(by).masked(weight, mask), bias, transposed).contiguous(),
        )

    return keep(slot, run_call(call, weight, input, bias))


@custom_op("nmcompile::cusparselt_linear_input_gradient", fake=_empty_input_gradient)
def linear_input_gradient(
    grad_output: Tensor, weight: Tensor, mask: Tensor | None, transposed: bool, library: str, slot: str
) -> Tensor:
    """Compute dX = dY W, `(..., out)` to `(..., in)`, with W 2:4 along out-features."""
    by = library_named(library)

    def call(weight: Tensor, grad_output: Tensor, _: Tensor | None) -> GemmCall[Tensor]:
        sparse = Operand(weight, 1 if transposed else 0, mask)
        return GemmCall(
            Product(by, sparse, by_rows(grad_output, -1)),
            lambda rows: rows.view(*grad_output.shape[:-1], sparse.rows),
            lambda: linear.linear_input_gradient(grad_output, kept_for(by).masked(weight, mask), transposed),
        )

    return keep(slot, run_call(call, weight, grad_output))


@custom_op(
    "nmcompile::cusparselt_pointwise_forward",
    fake=lambda input, weight: _empty_image(input, weight.shape[0]),
    tags=ANY_STRIDES,
)
def pointwise_forward(
    input: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, library: str, slot: str
) -> Tensor:
    """Compute Y = X * W + b for a 1x1 convolution, with W 2:4 along in-channels."""
    by = library_named(library)

    def call(weight: Tensor, input: Tensor, bias: Tensor | None) -> GemmCall[Tensor]:
        return GemmCall(
            Product(by, _channels(weight, mask, 1), by_rows(input, 1), bias, weight=weight),
            lambda rows: by_channels(rows, input, weight.shape[0]),
            lambda: _like(conv.conv_forward(input, kept_for(by).masked(weight, mask), bias, *_geometry(input)), input),
        )

    return keep(slot, run_call(call, weight, input, bias))


@custom_op(
    "nmcompile::cusparselt_pointwise_input_gradient",
    fake=lambda input: _empty_image(input, input.shape[1]),
    tags=ANY_STRIDES,
)
def pointwise_input_gradient(
    grad_output: Tensor, weight: Tensor, mask: Tensor | None, input: Tensor, library: str, slot: str
) -> Tensor:
    """Compute dX of a 1x1 convolution, with W 2:4 along out-channels; in the memory format of `input`."""
    by = library_named(library)

    def call(weight: Tensor, grad_output: Tensor, _: Tensor | None) -> GemmCall[Tensor]:
        def dense() -> Tensor:
            masked = kept_for(by).masked(weight, mask)
            return _like(conv.conv_input_gradient(grad_output, masked, input, *_geometry(input)), input)

        product = Product(by, _channels(weight, mask, 0), by_rows(grad_output, 1))
        return GemmCall(product, lambda rows: by_channels(rows, input, weight.shape[1]), dense)

    return keep(slot, run_call(call, weight, grad_output))


def _channels(weight: Tensor, mask: Tensor | None, dim: int) -> Operand:
    """Return the matrix of a 1x1 convolution's weight, 2:4 along that dim."""
    return Operand(weight.flatten(1), dim, None if mask is None else mask.flatten(1))


def _like(image: Tensor, input: Tensor) -> Tensor:
    """Return the image in the memory format of the input: PyTorch also follows the weight's."""
    return image.contiguous(memory_format=memory_format(input))


def _geometry(input: Tensor) -> tuple[list[int], list[int], list[int], int]:
    """Return stride, padding, dilation and groups of a 1x1 convolution."""
    dims = input.dim() - 2
    return [1] * dims, [0] * dims, [1] * dims, 1
