"""A second example, for files that leave sizes open."""

import re
from collections.abc import Callable, Mapping, Sequence

import onnx
import torch
from torch import Tensor, nn

from nmcompile.export.check.example import Example
from nmcompile.export.outputs import outputs_of
from nmcompile.printable import first_line

Dims = Sequence[Sequence[str]]
"""Dims of each input: the name of an open size, or "" for a fixed one."""
Range = tuple[float, float]
NAMED = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)")  # also a multiple, as in 2*height
CHANGES: tuple[Callable[[int], int], ...] = (lambda n: n // 2, lambda n: n - 1, lambda n: n + 1, lambda n: 2 * n)
SMALLEST = 2  # torch.export takes a size of 1 for a constant, and 0 for an empty tensor


def dims_of(graph: onnx.GraphProto) -> Dims:
    """Return the open dims of a file's inputs."""
    return [[dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in graph.input]


def one_sample(dims: Dims, example: Example, model: nn.Module) -> Example:
    """Return the example with a batch of one, or unchanged if the model then returns no finite number."""
    if not dims or not dims[0] or not dims[0][0]:
        return example
    sample = resized(example, dims, {dims[0][0]: 1})
    try:
        with torch.no_grad():
            has_numbers = any(bool(x.isfinite().any()) for x in outputs_of(sample.run(model)) if isinstance(x, Tensor))
    except Exception:  # raised by the model, which may need more than one sample
        return example
    return sample if has_numbers else example


def other_sizes(
    dims: Dims, ranges: Mapping[str, Range], example: Example, model: nn.Module
) -> tuple[list[Example], list[str]]:
    """Return an example with another size in every open dim besides the batch, if there is one, and a note about it.

    The first sizes at which the model runs are taken: half of those in `example`, one less, one more, and twice.
    """
    sizes = _sizes(dims, example)
    if sizes is None:
        return [], ["compared at the sizes of args only: others are computed from sizes of the inputs"]
    leading = dims[0][0] if dims and dims[0] else ""
    if set(sizes) <= {leading}:
        return [], []
    reason = "none of the sizes that were tried is allowed"
    for change in CHANGES:
        changed = {name: change(size) for name, size in sizes.items()}
        if all(_is_allowed(size, ranges.get(name, (0, float("inf")))) for name, size in changed.items()):
            other = resized(example, dims, changed)
            try:
                with torch.no_grad():
                    other.run(model)
            except Exception as error:  # raised by the model
                reason = f"the model does not run at {_shown(changed)}: {first_line(error)}"
            else:
                return [other], [f"compared at {_shown(sizes)} and at {_shown(changed)}"]
    return [], [f"compared at the sizes of args only: {reason}"]


def resized(example: Example, dims: Dims, sizes: Mapping[str, int]) -> Example:
    """Return the example with other sizes in open dims: cut, or repeated from the front."""

    def change(x: Tensor, names: Sequence[str]) -> Tensor:
        for dim, text in enumerate(names):
            match = NAMED.fullmatch(text)
            if match is not None and match[2] in sizes:
                size = int(match[1] or 1) * sizes[match[2]]
                x = x.index_select(dim, torch.arange(size, device=x.device) % x.shape[dim])
        return x

    return example.changed([change(x, names) for x, names in zip(example.tensors, dims, strict=True)])


def _sizes(dims: Dims, example: Example) -> dict[str, int] | None:
    """Return the sizes in the example by name; None if a dim is computed in a way that cannot be undone here."""
    found: dict[str, int] = {}
    for x, names in zip(example.tensors, dims, strict=True):
        for size, text in zip(x.shape, names, strict=True):
            match = NAMED.fullmatch(text)
            if text and match is None:
                return None
            if match is not None:
                found[match[2]] = size // int(match[1] or 1)
    return found


def _is_allowed(size: int, limits: Range) -> bool:
    return max(SMALLEST, limits[0]) <= size <= limits[1]


def _shown(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
