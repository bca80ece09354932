"""The steps of a runtime as rows of a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from nmcompile.runtime.steps import Call, Layer, Recode, Step, Sums


@dataclass(frozen=True)
class StepRow:
    """One step.

    Args:
        step: what it does.
        layer: the layer, or the operator of torch.
        form: the kernel of a layer.
        reads, writes: sizes, samples × height × width × channels of images.
        bytes: of the layer's packed weights.
    """

    HEADERS: ClassVar = ("step", "layer", "kernel", "reads", "writes", "weight bytes")

    step: str
    layer: str
    form: str
    reads: str
    writes: str
    bytes: int | None

    @property
    def cells(self) -> list[object]:
        return [self.step, self.layer, self.form, self.reads, self.writes, self.bytes]


def rows_of(steps: Sequence[Step], kernel: Callable[[int], tuple[str, int | None]]) -> tuple[StepRow, ...]:
    """Describe steps; `kernel` gives the form and the bytes of a step's weights."""
    return tuple(_row(step, *kernel(number)) for number, step in enumerate(steps))


def _row(step: Step, form: str, size: int | None) -> StepRow:
    layer = step.weights.layer if isinstance(step, Sums) else step.name if isinstance(step, Call) else ""
    reads = ", ".join(map(str, step.read))
    return StepRow(_title(step), layer, form, reads, str(step.written), size)


def _title(step: Step) -> str:
    """Return the kind of a step, and what it does to codes on the way."""
    parts = [type(step).__name__]
    if isinstance(step, Layer | Recode):
        parts += ["recode"] if step.table is not None and isinstance(step, Layer) else []
        parts += ["4:8"] if step.prune else []
    return " + ".join(parts)
