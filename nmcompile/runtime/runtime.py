"""A callable that computes what a compiled model does, in integers between its layers."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nmcompile.errors import OperandError
from nmcompile.printable import table
from nmcompile.runtime.arena import Arena
from nmcompile.runtime.lower import Program
from nmcompile.runtime.report import StepRow, rows_of
from nmcompile.runtime.steps import Call, Value


class Executor(Protocol):
    """Something that runs steps on images."""

    name: str

    def run(self, first: int, last: int, values: dict[Value, object]) -> None:
        """Run the steps from `first` up to `last`, which is left out: read values, and add those written."""

    def kernel(self, number: int) -> tuple[str, int | None]:
        """Return the kernel of a step, and the bytes of its weights; "" and None for one without weights."""


@dataclass(frozen=True)
class Profile:
    """The seconds of each step of a runtime, the least of several calls."""

    rows: tuple[StepRow, ...]
    seconds: tuple[float, ...]

    def __str__(self) -> str:
        total = sum(self.seconds)
        cells = [
            [*row.cells, 1e3 * one, f"{one / total:.1%}"] for row, one in zip(self.rows, self.seconds, strict=True)
        ]
        return f"{table(cells, [*StepRow.HEADERS, 'ms', 'share'], floatfmt='.3f')}\n\n{1e3 * total:.3f} ms in all steps"


class Runtime:
    """A network in integers for inputs of one shape on the CPU; `nmcompile.runtime` makes it.

    Calls wait for each other: all use the same memory. `print(runtime)` lists the steps.

    Attributes:
        program: the steps.
        arena: where the images lie.
        executor: what runs the steps.
    """

    def __init__(self, program: Program, arena: Arena, executor: Executor, example: Sequence[object]) -> None:
        self.program = program
        self.arena = arena
        self.executor = executor
        self._example = [(one.shape, one.dtype) if isinstance(one, Tensor) else one for one in example]
        self._parts = _parts(program)
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Return what the model returns for these inputs.

        Raises:
            OperandError: other arguments, shapes, dtypes or devices than those of the example, or a NaN.
        """
        values = self._values(args, kwargs)
        with self._lock:
            for first, last in self._parts:
                self._run(first, last, values)
        leaves = [values[one] if isinstance(one, Value) else one for one in self.program.outputs]
        return pytree.tree_unflatten(leaves, self.program.returns)

    @torch.no_grad()
    def profile(self, *args: object, calls: int = 10, **kwargs: object) -> Profile:
        """Return how long each step takes, run by itself, in the fastest of several calls."""
        count = len(self.program.steps)
        least = [float("inf")] * count
        for _ in range(calls):
            values = self._values(args, kwargs)
            with self._lock:
                for number in range(count):
                    start = time.perf_counter()
                    self._run(number, number + 1, values)
                    least[number] = min(least[number], time.perf_counter() - start)
        return Profile(self.rows, tuple(least))

    @property
    def rows(self) -> tuple[StepRow, ...]:
        """Return a row for each step."""
        return rows_of(self.program.steps, self.executor.kernel)

    def __str__(self) -> str:
        steps = table([row.cells for row in self.rows], StepRow.HEADERS)
        weights = sum(row.bytes or 0 for row in self.rows)
        return (
            f"{steps}\n\n{len(self.rows)} steps by {self.executor.name} kernels, {weights / 1e6:.2f} MB of weights, "
            f"{self.arena.bytes / 1e6:.2f} MB for activations"
        )

    def _run(self, first: int, last: int, values: dict[Value, object]) -> None:
        step = self.program.steps[first]
        if isinstance(step, Call):
            args, kwargs = step.arguments(values)
            values[step.result] = step.operator(*args, **kwargs)
        else:
            self.executor.run(first, last, values)

    def _values(self, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[Value, object]:
        leaves, takes = pytree.tree_flatten((args, kwargs))
        if takes != self.program.takes:
            raise OperandError(
                f"the runtime was made for other arguments than these {len(args)} by place and {sorted(kwargs)} by "
                "name; call it as the example, or make a runtime with nmcompile.runtime for each form"
            )
        for number, (one, wanted) in enumerate(zip(leaves, self._example, strict=True), start=1):
            _check(number, one, wanted)
        return dict(zip(self.program.inputs, leaves, strict=True))


def _check(number: int, given: object, wanted: object) -> None:
    """Raise unless an input is like that of the example."""
    if not isinstance(given, Tensor):
        found = given
    elif given.device.type != "cpu" or given.layout != torch.strided:
        raise OperandError(
            f"input {number} is {given.layout} on {given.device}; a runtime takes dense tensors of the CPU"
        )
    else:
        found = (given.shape, given.dtype)
    if type(found) is not type(wanted) or found != wanted:
        raise OperandError(
            f"input {number} is {_described(found)}, but the runtime was made for {_described(wanted)}; make another "
            "with nmcompile.runtime, or bring the input into that form"
        )


def _described(one: object) -> str:
    return f"{one[1]} of shape {tuple(one[0])}" if isinstance(one, tuple) and len(one) == 2 else repr(one)


def _parts(program: Program) -> list[tuple[int, int]]:
    """Return the ranges of steps that one call of the executor, or one operator of torch, computes."""
    parts = list[tuple[int, int]]()
    for is_call, group in groupby(enumerate(program.steps), lambda one: isinstance(one[1], Call)):
        numbers = [number for number, _ in group]
        parts += [(n, n + 1) for n in numbers] if is_call else [(numbers[0], numbers[-1] + 1)]
    return parts
