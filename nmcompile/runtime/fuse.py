"""Recodings that go into the step before them, so that codes pass through memory once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from nmcompile.runtime.steps import Flatten, Layer, Recode, Step


def fuse(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Let layers and flattening write what the only reader of their codes would make of them."""
    readers = Counter(one for step in steps for one in step.read)
    fused: list[Step] = []
    for step in steps:
        is_alone = isinstance(step, Recode) and readers[step.input] == 1
        index = next((i for i, one in enumerate(fused) if is_alone and one.written in step.read), None)
        recoding = None if index is None else _recoding(fused[index], step)
        if index is None or recoding is None:
            fused.append(step)
        else:
            fused[index] = recoding
    return tuple(fused)


def _recoding(writer: Step, recode: Step) -> Step | None:
    """Return the writer of codes as it recodes them itself; None if it cannot."""
    if not isinstance(writer, Layer | Flatten) or writer.table is not None or writer.prune:
        return None
    assert isinstance(recode, Recode)
    return replace(writer, output=recode.output, table=recode.table, prune=recode.prune)
