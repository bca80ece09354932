"""The three GEMMs of a layer as one contraction, and where in the tensors each of its indices is.

    C[row, lane] = sum over depth of S[row, depth] · D[depth, lane]

    GEMM       C    S     rows          D    depth                     lanes
    forward    Y    W     out-channels  X    kernel, in-channels       samples, output positions
    backward   dX   Wᵀ    in-channels   dY   kernel, out-channels      samples, input positions
    update     dW   dYᵀ   out-channels  X    samples, output positions kernel, in-channels

S is the pruned operand, cut into fours along depth. All tensors are images `(samples, channels, height, width)` of any
strides; a linear layer is a 1x1 convolution. The kernel reads D where it lies, with no matrix of windows in between.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from torch import Tensor

Pair = tuple[int, int]


class Axis(NamedTuple):
    """An index in mixed radix, the last digit fastest.

    Args:
        digits: size of each digit, and the increments of one step: of the offset in the tensor (in elements), and of
            the row and the column in the image.
        start: offset, row and column at index 0.
    """

    digits: tuple[tuple[int, int, int, int], ...]
    start: tuple[int, int, int] = (0, 0, 0)

    @property
    def size(self) -> int:
        return math.prod(digit[0] for digit in self.digits)

    def ends(self, place: int) -> Pair:
        """Return the lowest and the highest row (`place` 1) or column (2)."""
        reach = [(digit[0] - 1) * digit[place + 1] for digit in self.digits]
        return self.start[place] + sum(min(0, r) for r in reach), self.start[place] + sum(max(0, r) for r in reach)

    def without_places(self) -> "Axis":
        return Axis(tuple((*digit[:2], 0, 0) for digit in self.digits), (self.start[0], 0, 0))


class Contraction(NamedTuple):
    """Arguments of `nmcompile._kernels.gemm`. An element of `dense` whose place is outside the image is zero."""

    sparse: Tensor
    rows: int
    sparse_row: int
    sparse_depth: Axis
    dense: Tensor
    dense_depth: Axis
    dense_lanes: Axis
    height: int
    width: int
    output: Tensor
    output_row: int
    output_lanes: Axis

    @property
    def multiplications(self) -> int:
        """Return the number of multiplications with a dense S."""
        return self.rows * self.sparse_depth.size * self.dense_lanes.size

    def settled(self) -> "Contraction":
        """Return the same contraction, without an image if every place is inside it: reads then cross rows."""
        axes = self.dense_depth, self.dense_lanes
        for place, size in ((1, self.height), (2, self.width)):
            ends = [axis.ends(place) for axis in axes]
            if sum(low for low, _ in ends) < 0 or sum(high for _, high in ends) >= size:
                return self
        depth, lanes = (axis.without_places() for axis in axes)
        return self._replace(dense_depth=depth, dense_lanes=lanes, height=1, width=1)


class Window(NamedTuple):
    """Movement of a kernel over an image, by height and width."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)


def forward(input: Tensor, weight: Tensor, output: Tensor, window: Window) -> Contraction:
    """Contract X and W of one group to Y, written to `output`."""
    depth = _plain((weight.shape[2], weight.stride(2)), (weight.shape[3], weight.stride(3)), _dim(weight, 1))
    kernel, positions = _kernel(input, weight, window), _positions(input, output, window)
    height, width = input.shape[2:]
    return Contraction(
        weight,
        weight.shape[0],
        weight.stride(0),
        depth,
        input,
        Axis((*kernel, (input.shape[1], input.stride(1), 0, 0))),
        Axis(((input.shape[0], input.stride(0), 0, 0), *positions), _corner(input, window)),
        height,
        width,
        output,
        output.stride(1),
        _plain(_dim(output, 0), _dim(output, 2), _dim(output, 3)),
    ).settled()


def update(grad_output: Tensor, input: Tensor, grad_weight: Tensor, window: Window, samples: int) -> Contraction:
    """Contract dY and X of one group to dW, written to `grad_weight`; depth runs across `samples` samples first."""
    (h, w), count = grad_output.shape[2:], grad_output.shape[0]
    of, to = input.stride(0), grad_output.stride(0)
    positions, kernel = _positions(input, grad_output, window), _kernel(input, grad_weight, window)
    channels = (input.shape[1], input.stride(1), 0, 0)
    written = [_dim(grad_weight, 2), _dim(grad_weight, 3), _dim(grad_weight, 1)]
    lanes = (*kernel, channels)
    if input.stride(1) != 1:  # the windows of one channel after the other
        lanes, written = (channels, *kernel), [written[2], *written[:2]]
    height, width = input.shape[2:]
    return Contraction(
        grad_output,
        grad_output.shape[1],
        grad_output.stride(1),
        _plain((count // samples, samples * to), (h, grad_output.stride(2)), (w, grad_output.stride(3)), (samples, to)),
        input,
        Axis(((count // samples, samples * of, 0, 0), *positions, (samples, of, 0, 0))),
        Axis(lanes, _corner(input, window)),
        height,
        width,
        grad_weight,
        grad_weight.stride(0),
        _plain(*written),
    ).settled()


def backward(grad_output: Tensor, weight: Tensor, grad_input: Tensor, window: Window) -> Iterator[Contraction]:
    """Yield contractions of dY and W of one group to dX: one per class of input positions that meet the same weights.

    With stride s an input position h meets the weights k for which h + padding - k·dilation divides by s, so all h that
    are equal modulo s meet the same. `grad_input` has to be zero where none do.
    """
    for phase in product(range(window.stride[0]), range(window.stride[1])):
        taps = [_taps(phase[i], weight.shape[2 + i], *(value[i] for value in window)) for i in range(2)]
        sizes = [-(-(grad_input.shape[2 + i] - phase[i]) // window.stride[i]) for i in range(2)]
        if taps[0].number and taps[1].number and min(sizes) > 0:
            yield _backward_of(grad_output, weight, grad_input, window.stride, phase, taps, sizes)


def reaches_all(weight: Tensor, window: Window) -> bool:
    """Return whether every input position meets some weight, so `backward` writes all of dX."""
    return all(
        _taps(phase, weight.shape[2 + i], *(value[i] for value in window)).number
        for i in range(2)
        for phase in range(window.stride[i])
    )


class _Taps(NamedTuple):
    """Kernel positions `first, first + step, ...`, and the output position of the first and from each to the next."""

    first: int
    step: int
    number: int
    place: int
    advance: int


def _taps(phase: int, size: int, stride: int, padding: int, dilation: int) -> _Taps:
    step = stride // math.gcd(stride, dilation)
    meets = (k for k in range(min(size, step)) if (phase + padding - k * dilation) % stride == 0)
    first = next(meets, size)
    place = (phase + padding - first * dilation) // stride
    return _Taps(first, step, len(range(first, size, step)), place, -step * dilation // stride)


def _backward_of(
    grad_output: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    stride: Pair,
    phase: Pair,
    taps: list[_Taps],
    sizes: list[int],
) -> Contraction:
    (v, h), (row, column) = taps, (grad_output.stride(2), grad_output.stride(3))
    weights = (v.number, v.step * weight.stride(2), 0, 0), (h.number, h.step * weight.stride(3), 0, 0)
    first = v.first * weight.stride(2) + h.first * weight.stride(3)
    reached = (v.number, v.advance * row, v.advance, 0), (h.number, h.advance * column, 0, h.advance)
    place = v.place * row + h.place * column, v.place, h.place
    lanes = (grad_output.shape[0], grad_output.stride(0), 0, 0), (sizes[0], row, 1, 0), (sizes[1], column, 0, 1)
    written = tuple((sizes[i], stride[i] * grad_input.stride(2 + i), 0, 0) for i in range(2))
    start = phase[0] * grad_input.stride(2) + phase[1] * grad_input.stride(3)
    height, width = grad_output.shape[2:]
    return Contraction(
        weight,
        weight.shape[1],
        weight.stride(1),
        Axis((*weights, (*_dim(weight, 0), 0, 0)), (first, 0, 0)),
        grad_output,
        Axis((*reached, (*_dim(grad_output, 1), 0, 0))),
        Axis(lanes, place),
        height,
        width,
        grad_input,
        grad_input.stride(1),
        Axis(((*_dim(grad_input, 0), 0, 0), *written), (start, 0, 0)),
    ).settled()


def _kernel(input: Tensor, weight: Tensor, window: Window) -> tuple[tuple[int, int, int, int], ...]:
    """Return the digits of the kernel's row and column as places in the input."""
    (v, h), (row, column) = window.dilation, input.stride()[2:]
    return (weight.shape[2], v * row, v, 0), (weight.shape[3], h * column, 0, h)


def _positions(input: Tensor, output: Tensor, window: Window) -> tuple[tuple[int, int, int, int], ...]:
    """Return the digits of the output's row and column as places in the input."""
    (v, h), (row, column) = window.stride, input.stride()[2:]
    return (output.shape[2], v * row, v, 0), (output.shape[3], h * column, 0, h)


def _corner(input: Tensor, window: Window) -> tuple[int, int, int]:
    v, h = window.padding
    return -v * input.stride(2) - h * input.stride(3), -v, -h


def _dim(x: Tensor, dim: int) -> Pair:
    return x.shape[dim], x.stride(dim)


def _plain(*digits: Pair) -> Axis:
    return Axis(tuple((size, step, 0, 0) for size, step in digits))
