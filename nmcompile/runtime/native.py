"""The steps on native kernels: one program, whose runs read and write floats at the addresses of torch's tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nmcompile.errors import OperandError
from nmcompile.native import isa_and_threads, kernels
from nmcompile.runtime.arena import Arena
from nmcompile.runtime.reference import NO_NUMBER, tensor_of
from nmcompile.runtime.steps import (
    Add,
    Call,
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


class NativeExecutor:
    """An executor of steps on images in the memory of an arena.

    Args:
        steps: of a network; calls of torch among them are left out of the native program.
    """

    name = "native"

    def __init__(self, steps: Sequence[Step], arena: Arena) -> None:
        self.steps = steps
        self.arena = arena
        self.program = kernels.IntegerProgram(arena.bytes)
        self.layers: dict[int, kernels.IntegerLayer] = {}
        self._slots: dict[Value, int] = {}
        self._floating: dict[tuple[int, int], list[Encode | Decode | LayerToFloats]] = {}
        self._before: list[int] = []
        """How many native steps come before each step, and in all."""
        for number, step in enumerate(steps):
            self._before.append(number if number == 0 else self._before[-1] + (not isinstance(steps[number - 1], Call)))
            self._add(number, step)
        self._before.append(len(steps) - sum(isinstance(step, Call) for step in steps))

    def run(self, first: int, last: int, values: dict[Value, object]) -> None:
        """Run the steps from `first` up to `last`, which is left out.

        Raises:
            OperandError: a value to be encoded has a NaN.
        """
        used = dict[Value, Tensor]()
        for step in self._with_floats(first, last):
            if isinstance(step, Encode):
                used[step.input] = tensor_of(values, step.input).contiguous()
            else:
                values[step.result] = used[step.result] = torch.empty(step.result.shape)
        addresses = [0] * len(self._slots)
        for value, tensor in used.items():
            addresses[self._slots[value]] = tensor.data_ptr()
        if self.program.run(self._before[first], self._before[last], addresses, *isa_and_threads()) >= 0:
            raise OperandError(NO_NUMBER)

    def _with_floats(self, first: int, last: int) -> Sequence[Encode | Decode | LayerToFloats]:
        """Return the steps of a range that read or write floats."""
        if (first, last) not in self._floating:
            steps = self.steps[first:last]
            self._floating[first, last] = [one for one in steps if isinstance(one, Encode | Decode | LayerToFloats)]
        return self._floating[first, last]

    def kernel(self, number: int) -> tuple[str, int | None]:
        layer = self.layers.get(number)
        return ("", None) if layer is None else (layer.form, layer.bytes)

    def _slot(self, value: Value) -> int:
        return self._slots.setdefault(value, len(self._slots))

    def _image(self, image: Image) -> "kernels.Image":
        place = self.arena.places[image]
        return place.offset, *image.shape, place.halo, place.fill, place.stride

    def _add(self, number: int, step: Step) -> None:
        """Add a step to the native program."""
        program, image = self.program, self._image
        match step:
            case Sums():
                self._add_layer(number, step)
            case Encode():
                program.encode(self._slot(step.input), image(step.output), step.step, step.low, step.high)
            case Recode():
                program.recode(image(step.input), image(step.output), step.table, step.prune)
            case Add():
                operands = image(step.input), image(step.other), image(step.output)
                program.add(*operands, step.offset, step.low, step.high)
            case MaxPool(window=window):
                sizes = window.kernel, window.stride, window.padding, window.dilation
                program.max_pool(image(step.input), image(step.output), *sizes)
            case Flatten():
                program.flatten(image(step.input), image(step.output), step.table, step.prune)
            case Decode():
                program.decode(image(step.input), self._slot(step.result), step.values)

    def _add_layer(self, number: int, step: Sums) -> None:
        weights, window, input = step.weights, step.window, self._image(step.input)
        layer = kernels.integer_layer(weights.integers, step.groups, window.stride, window.dilation, step.most)
        self.layers[number] = layer
        sums = step.zero, window.padding, weights.steps, weights.bias, weights.gain, weights.shift
        if isinstance(step, LayerToFloats):
            self.program.layer_to_floats(layer, input, self._slot(step.result), *sums)
        elif isinstance(step, Layer):
            grid = step.step, step.low, step.high
            self.program.layer(layer, input, self._image(step.output), *sums, *grid, step.table, step.prune)
