"""Conv and linear layers: name, geometry, and which weight dims are out and in."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nmcompile.errors import OperandError
from nmcompile.ir.conv_result import conv_result
from nmcompile.pruning.pattern import NMPattern


@dataclass(frozen=True)
class Layer:
    """Common base of conv and linear layers. `weight_shape` is the shape of the stored weight."""

    name: str
    weight_shape: tuple[int, ...]
    has_bias: bool

    groups = 1

    @property
    def out_dim(self) -> int:
        """Return the dim of the weight that holds out-features or out-channels."""
        return 0

    @property
    def in_dim(self) -> int:
        """Return the dim of the weight that holds in-features or in-channels."""
        return 1

    @property
    def kind(self) -> str:
        """Return `linear`, `conv1d` to `conv3d`, or `conv_transpose1d` to `conv_transpose3d`."""
        raise NotImplementedError

    @property
    def channel_dim(self) -> int:
        """Return the dim of the input and of the output that holds channels or features."""
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        """Return the out-features or out-channels, all groups together."""
        return self.weight_shape[self.out_dim]

    @property
    def in_features(self) -> int:
        """Return the in-features or in-channels of one group: the forward GEMM's contraction per kernel position."""
        return self.weight_shape[self.in_dim]

    @property
    def parameters(self) -> int:
        """Return the number of elements of the weight."""
        return torch.Size(self.weight_shape).numel()

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """Return the shape of one number for each output, which broadcasts to the weight's."""
        return tuple(size if dim == self.out_dim else 1 for dim, size in enumerate(self.weight_shape))

    @property
    def multiplied(self) -> int:
        """Return the number of elements of the weight that each position is multiplied by."""
        return self.parameters

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.in_features == 1

    def fits_forward(self, pattern: NMPattern) -> bool:
        """Return whether blocks of the pattern divide the in-channels of each group."""
        return self.in_features % pattern.block == 0

    def fits_backward(self, pattern: NMPattern) -> bool:
        """Return whether blocks of the pattern divide the out-channels of each group."""
        return (self.out_features // self.groups) % pattern.block == 0

    def of_call(self) -> "Layer":
        """Return the layer that one call runs."""
        return self

    def prepare(self, x: Tensor) -> tuple[Tensor, bool]:
        """Return the input as the GEMM takes it, and whether a batch dim was added.

        Raises:
            OperandError: an input of a rank that a convolution does not take.
        """
        raise NotImplementedError

    def takes(self, x: Tensor) -> bool:
        """Return whether the GEMM takes an input as it is, and `result` knows the result."""
        return False

    def result(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return a meta tensor with the sizes and strides of the result for an input that `takes` accepts."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearLayer(Layer):
    """Y = X Wᵀ + b. `transposed` is for weights stored (in, out), as in `addmm` and Hugging Face's Conv1D."""

    transposed: bool = False

    kind = "linear"
    channel_dim = -1

    @property
    def out_dim(self) -> int:
        return 1 if self.transposed else 0

    @property
    def in_dim(self) -> int:
        return 0 if self.transposed else 1

    def prepare(self, x: Tensor) -> tuple[Tensor, bool]:
        return (x.unsqueeze(0), True) if x.dim() == 1 else (x, False)

    def takes(self, x: Tensor) -> bool:
        return True

    def result(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.empty((*x.shape[:-1], self.out_features), device="meta")


@dataclass(frozen=True)
class StackedLinearLayer(LinearLayer):
    """Linear layers that share one parameter, as experts do: (experts, out, in), or (experts, in, out) `transposed`.

    A call multiplies by one of the matrices, and each matrix is pruned by itself.
    """

    @property
    def out_dim(self) -> int:
        return super().out_dim + 1

    @property
    def in_dim(self) -> int:
        return super().in_dim + 1

    @property
    def rows_shape(self) -> tuple[int, ...]:
        return (self.weight_shape[0], *super().rows_shape[1:])

    @property
    def multiplied(self) -> int:
        return self.in_features * self.out_features

    def of_call(self) -> LinearLayer:
        return LinearLayer(self.name, self.weight_shape[1:], self.has_bias, self.transposed)


@dataclass(frozen=True)
class SpatialLayer(Layer):
    """Common base of convolutions and transposed convolutions of 1 to 3 spatial dims.

    The GEMM does the symmetric zero padding `padding`.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    channel_dim = 1

    @property
    def spatial_dims(self) -> int:
        return len(self.weight_shape) - 2

    def prepare(self, x: Tensor) -> tuple[Tensor, bool]:
        batched_dim = len(self.weight_shape)
        unbatched = x.dim() == batched_dim - 1
        if not unbatched and x.dim() != batched_dim:
            size = ("length", "height, width", "depth, height, width")[self.spatial_dims - 1]
            raise OperandError(
                f"layer {self.name!r}: its input has shape {tuple(x.shape)}, but a {self.kind} takes (batch, channels, "
                f"{size}) or one sample without the batch dim; reshape the input"
            )
        if unbatched:
            x = x.unsqueeze(0)
        return x, unbatched


@dataclass(frozen=True)
class ConvLayer(SpatialLayer):
    """Convolution; weight (out, in / groups, *kernel).

    `pad_before` (in `F.pad`'s order) is applied first, with `padding_mode`, for padding that a convolution cannot do
    itself.
    """

    groups: int = 1
    padding_mode: str = "constant"
    pad_before: tuple[int, ...] = field(default=())

    @property
    def kind(self) -> str:
        return f"conv{self.spatial_dims}d"

    def prepare(self, x: Tensor) -> tuple[Tensor, bool]:
        x, unbatched = super().prepare(x)
        if self.pad_before:
            x = F.pad(x, self.pad_before, mode=self.padding_mode)
        return x, unbatched

    def takes(self, x: Tensor) -> bool:
        return x.dim() == len(self.weight_shape) and self.spatial_dims < 3 and not self.pad_before

    def result(self, x: Tensor, weight: Tensor) -> Tensor:
        return conv_result(x, weight, self.stride, self.padding, self.dilation)


@dataclass(frozen=True)
class ConvTransposeLayer(SpatialLayer):
    """Transposed convolution of one group: the gradient of a convolution's input; weight (in, out, *kernel)."""

    output_padding: tuple[int, ...] = ()

    @property
    def out_dim(self) -> int:
        return 1

    @property
    def in_dim(self) -> int:
        return 0

    @property
    def kind(self) -> str:
        return f"conv_transpose{self.spatial_dims}d"


def conv_layer(
    name: str,
    weight_shape: Sequence[int],
    has_bias: bool,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> ConvLayer:
    """Make a `ConvLayer` from the arguments of `F.conv2d` and `nn.Conv2d`, including `"same"` and `"valid"`."""
    dims = len(weight_shape) - 2
    stride, dilation = _per_dim(stride, dims), _per_dim(dilation, dims)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, weight_shape[2:], strict=True)]
        left, right = [t // 2 for t in totals], [t - t // 2 for t in totals]
    else:
        left = right = list(_per_dim(0 if isinstance(padding, str) else padding, dims))
    if padding_mode == "zeros":
        # A convolution pads symmetrically; the remainder of an uneven "same" goes to the far side, as in ATen.
        pad_before = [n for a, b in zip(reversed(left), reversed(right), strict=True) for n in (0, b - a)]
        symmetric = tuple(left)
    else:
        pad_before = [n for a, b in zip(reversed(left), reversed(right), strict=True) for n in (a, b)]
        symmetric = (0,) * dims
    return ConvLayer(
        name,
        tuple(weight_shape),
        has_bias,
        stride=stride,
        padding=symmetric,
        dilation=dilation,
        groups=groups,
        padding_mode="constant" if padding_mode == "zeros" else padding_mode,
        pad_before=tuple(pad_before) if any(pad_before) else (),
    )


def conv_transpose_layer(
    name: str,
    weight_shape: Sequence[int],
    has_bias: bool,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> ConvTransposeLayer:
    """Make a `ConvTransposeLayer` from the arguments of `nn.ConvTranspose2d`."""
    given = (_per_dim(value, len(weight_shape) - 2) for value in (stride, padding, dilation, output_padding))
    return ConvTransposeLayer(name, tuple(weight_shape), has_bias, *given)


def _per_dim(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    values = tuple(int(v) for v in value)
    return values * dims if len(values) == 1 else values
