"""The steps of a network in integers, and what they read and write.

An image holds codes, one byte for each element of an activation; the lowering knows what each code stands for. Values
of any other kind are torch's own, outside the memory of images. A step reads what earlier steps wrote.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from torch import Tensor
from torch.utils import _pytree as pytree

CODES = 256


@dataclass(frozen=True, eq=False)
class Image:
    """Codes, uint8 `(samples, height, width, channels)`; features have one pixel.

    Args:
        whole: the image of which this one is the channels from `first` on; None if it has memory of its own.
    """

    samples: int
    height: int
    width: int
    channels: int
    whole: "Image | None" = None
    first: int = 0

    @property
    def memory(self) -> "Image":
        """Return the image that owns the memory."""
        return self if self.whole is None else self.whole

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.samples, self.height, self.width, self.channels

    def __str__(self) -> str:
        return "×".join(map(str, self.shape))


@dataclass(frozen=True, eq=False)
class Value:
    """A value of torch, of any kind; `shape` is that of a tensor, for reports."""

    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        return "×".join(map(str, self.shape)) or "scalar"


@dataclass(frozen=True, eq=False)
class Step:
    """Common base of the steps: `read` and `written` say which images and values they read and write."""

    @property
    def read(self) -> tuple[Image | Value, ...]:
        return tuple(one for name, one in self._operands() if name not in ("output", "result"))

    @property
    def written(self) -> Image | Value:
        return next(one for name, one in self._operands() if name in ("output", "result"))

    def _operands(self) -> Iterator[tuple[str, Image | Value]]:
        for field in fields(self):
            one = getattr(self, field.name)
            if isinstance(one, Image | Value):
                yield field.name, one


@dataclass(frozen=True, eq=False)
class Encode(Step):
    """clamp(round(x / step), low, high) - low, of floats `(samples, channels, ...)`."""

    input: Value
    output: Image
    step: float
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Weights:
    """The integers of a layer, and what its sums are multiplied by and added to.

    Args:
        layer: the layer's name.
        integers: int8 `(out, height, width, in / groups)`.
        steps, bias, gain, shift: float32 `(out,)`; y = (n * steps + bias) * gain + shift, rounded after each operation.
    """

    layer: str
    integers: Tensor
    steps: Tensor
    bias: Tensor | None
    gain: Tensor | None
    shift: Tensor | None


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution or of pooling: (height, width) each."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


@dataclass(frozen=True, eq=False)
class Sums(Step):
    """Common base of a layer's steps: n = sum of integers × (code - zero); `most` is the largest code of the input."""

    weights: Weights
    window: Window
    groups: int
    input: Image
    zero: int
    most: int


@dataclass(frozen=True, eq=False)
class LayerToFloats(Sums):
    """A layer whose result y stays in floats."""

    result: Value


@dataclass(frozen=True, eq=False)
class Layer(Sums):
    """A layer whose result is clamp(round(y / step), low, high) - low, then recoded by a table, then pruned 4:8."""

    output: Image
    step: float
    low: int
    high: int
    table: Tensor | None = None
    prune: bool = False


@dataclass(frozen=True, eq=False)
class Recode(Step):
    """table[code], then 4:8: of each eight channels the four largest codes are kept, the first of equal ones."""

    input: Image
    output: Image
    table: Tensor | None = None
    prune: bool = False


@dataclass(frozen=True, eq=False)
class Add(Step):
    """clamp(a + b + offset, low, high)."""

    input: Image
    other: Image
    output: Image
    offset: int
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class MaxPool(Step):
    """The largest code of each window, which ends at the border."""

    input: Image
    output: Image
    window: Window


@dataclass(frozen=True, eq=False)
class Flatten(Step):
    """One pixel with the channels in torch's order (channel, height, width), recoded, then pruned."""

    input: Image
    output: Image
    table: Tensor | None = None
    prune: bool = False


@dataclass(frozen=True, eq=False)
class Decode(Step):
    """values[code], float32 `(samples, channels, height, width)` in the shape of the result."""

    input: Image
    result: Value
    values: Tensor


@dataclass(frozen=True, eq=False)
class Call(Step):
    """An operator of torch; its arguments may hold values."""

    name: str
    operator: Callable[..., object]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    result: Value

    def arguments(self, values: Mapping[Value, object]) -> tuple[Sequence[object], Mapping[str, object]]:
        """Return the operator's arguments, with what values hold in their place."""
        if self._is_flat:  # nearly always, and in a tenth of the time
            return [values[one] if isinstance(one, Value) else one for one in self.args], self.kwargs
        args, kwargs = pytree.tree_map_only(Value, values.__getitem__, (self.args, self.kwargs))
        return args, kwargs

    @cached_property
    def _is_flat(self) -> bool:
        """Return whether all values are arguments by place, none inside a list."""
        return sum(isinstance(one, Value) for one in self.args) == len(self.read)

    @property
    def read(self) -> tuple[Image | Value, ...]:
        leaves = pytree.tree_leaves((self.args, self.kwargs), is_leaf=lambda one: isinstance(one, Value))
        return tuple(one for one in leaves if isinstance(one, Value))
