"""The steps in torch, with exact sums in float64: what native kernels have to equal, and what runs without them."""

from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor

from nmcompile.errors import OperandError
from nmcompile.pruning.magnitude import greedy_by_value
from nmcompile.pruning.pattern import NMPattern
from nmcompile.runtime.steps import (
    Add,
    Decode,
    Encode,
    Flatten,
    Image,
    Layer,
    LayerToFloats,
    MaxPool,
    Recode,
    Step,
    Sums,
    Value,
)

PATTERN = NMPattern(4, 8)
NO_NUMBER = "the network meets a NaN, which integers cannot hold; check the inputs, or call the model itself"


class ReferenceExecutor:
    """An executor of steps on images; `images` holds the codes, uint8 `(samples, height, width, channels)`."""

    name = "reference"

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self.images: dict[Image, Tensor] = {}

    @torch.no_grad()
    def run(self, first: int, last: int, values: dict[Value, object]) -> None:
        """Run the steps from `first` up to `last`, which is left out.

        Raises:
            OperandError: a value to be encoded has a NaN.
        """
        for step in self.steps[first:last]:
            result = compute(step, lambda one: tensor_of(values, one) if isinstance(one, Value) else self._codes(one))
            if isinstance(step.written, Value):
                values[step.written] = result
            else:
                self._codes(step.written).copy_(result)

    def kernel(self, number: int) -> tuple[str, int | None]:
        step = self.steps[number]
        return ("float64", 8 * step.weights.integers.numel()) if isinstance(step, Sums) else ("", None)

    def _codes(self, image: Image) -> Tensor:
        if image not in self.images:
            whole = image.whole
            self.images[image] = (
                torch.empty(image.shape, dtype=torch.uint8)
                if whole is None
                else self._codes(whole)[..., image.first : image.first + image.channels]
            )
        return self.images[image]


def tensor_of(values: Mapping[Value, object], value: Value) -> Tensor:
    """Return a value that is a tensor."""
    tensor = values[value]
    assert isinstance(tensor, Tensor)
    return tensor


Look = Callable[[Image | Value], Tensor]


@singledispatch
def compute(step: Step, look: Look) -> Tensor:
    """Return what a step writes.

    Args:
        look: gives what it reads.
    """
    raise NotImplementedError(type(step).__name__)


@compute.register
def _(step: Encode, look: Look) -> Tensor:
    image, x = step.output, look(step.input)
    if bool(x.isnan().any()):
        raise OperandError(NO_NUMBER)
    planar = x.reshape(image.samples, image.channels, image.height, image.width)
    return _to_codes(planar, step.step, step.low, step.high).permute(0, 2, 3, 1)


@compute.register
def _(step: LayerToFloats, look: Look) -> Tensor:
    return _sums(step, look).reshape(step.result.shape)


@compute.register
def _(step: Layer, look: Look) -> Tensor:
    codes = _to_codes(_sums(step, look), step.step, step.low, step.high).permute(0, 2, 3, 1)
    return _finished(codes, step.table, step.prune)


@compute.register
def _(step: Recode, look: Look) -> Tensor:
    return _finished(look(step.input), step.table, step.prune)


@compute.register
def _(step: Add, look: Look) -> Tensor:
    total = look(step.input).int() + look(step.other).int() + step.offset
    return total.clamp(step.low, step.high).to(torch.uint8)


@compute.register
def _(step: MaxPool, look: Look) -> Tensor:
    window, output = step.window, step.output
    x = look(step.input).permute(0, 3, 1, 2).float()
    # With as much behind the border as the last window takes, whether sizes are rounded up or down.
    sizes = zip((output.height, output.width), x.shape[2:], window.kernel, window.stride, window.padding,
                window.dilation, strict=True)  # fmt: skip
    behind = [max(0, (n - 1) * s + d * (k - 1) + 1 - p - size) for n, size, k, s, p, d in sizes]
    (top, left), (bottom, right) = window.padding, behind
    padded = F.pad(x, (left, right, top, bottom), value=-1.0)
    pooled = F.max_pool2d(padded, window.kernel, window.stride, 0, window.dilation)
    return pooled[:, :, : output.height, : output.width].to(torch.uint8).permute(0, 2, 3, 1)


@compute.register
def _(step: Flatten, look: Look) -> Tensor:
    flat = look(step.input).permute(0, 3, 1, 2).reshape(step.output.shape)
    return _finished(flat, step.table, step.prune)


@compute.register
def _(step: Decode, look: Look) -> Tensor:
    return step.values[look(step.input).long()].permute(0, 3, 1, 2).reshape(step.result.shape)


def _sums(step: Sums, look: Look) -> Tensor:
    """Return a layer's result, float32 `(samples, out, height, width)`."""
    weights, window = step.weights, step.window
    x = (look(step.input).double() - step.zero).permute(0, 3, 1, 2)
    kernel = weights.integers.double().permute(0, 3, 1, 2)
    n = F.conv2d(x, kernel, None, window.stride, window.padding, window.dilation, step.groups)
    y = n.float() * _by_channel(weights.steps)
    y = y if weights.bias is None else y + _by_channel(weights.bias)
    if weights.gain is not None and weights.shift is not None:
        y = y * _by_channel(weights.gain) + _by_channel(weights.shift)
    return y


def _by_channel(factors: Tensor) -> Tensor:
    return factors[:, None, None]


def _finished(codes: Tensor, table: Tensor | None, prune: bool) -> Tensor:
    codes = codes if table is None else table[codes.long()]
    return greedy_by_value.prune(codes.float(), PATTERN, -1, None).to(torch.uint8) if prune else codes


def _to_codes(x: Tensor, step: float, low: int, high: int) -> Tensor:
    """Return clamp(round(x / step), low, high) - low, uint8."""
    return (torch.round(x / torch.tensor(step, dtype=torch.float32)).clamp(low, high) - low).to(torch.uint8)
