"""End-to-end comparison of an exported file with the torch model, in several runtimes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from nmcompile.errors import ExportError, LibraryError
from nmcompile.export.check.array_difference import Array, difference, finite
from nmcompile.export.check.compare_layers import RELATIVE_L2
from nmcompile.export.check.example import Example
from nmcompile.export.check.lockstep import Lockstep
from nmcompile.export.check.other_sizes import dims_of, one_sample
from nmcompile.export.check.run_file import Arrays, Runner, onnxruntime_runner, reference_runner
from nmcompile.export.outputs import outputs_of
from nmcompile.files.open_onnx import OnnxFile

SAME_TOP1 = 0.99
ONNXRUNTIME, REFERENCE = "ONNX Runtime", "onnx.reference"
Batches = Sequence[Example]
Dtypes = Mapping[str, np.dtype[np.generic]]


@dataclass(frozen=True)
class RuntimeCheck:
    """A runtime compared with torch.

    Attributes:
        runtime: its name.
        relative_l2: |difference| / |torch| over all outputs and batches.
        same_top1: the fraction of samples with the same largest class; 1 if no output has shape (batch, classes).
        taken_over: number of integers that torch took over from the runtime in lockstep; None if they agree without.
    """

    runtime: str
    relative_l2: float
    same_top1: float
    taken_over: int | None = None

    @property
    def ok(self) -> bool:
        return self.relative_l2 <= RELATIVE_L2 and self.same_top1 >= SAME_TOP1  # a NaN is not

    def __str__(self) -> str:
        how = "" if self.taken_over is None else f"in lockstep, {self.taken_over} integers rounded otherwise: "
        return f"{self.runtime}: {how}relative L2 {self.relative_l2:.1e}, same top-1 {self.same_top1:.1%}"


def compare_runtime(
    name: str,
    run: Runner,
    inputs: Dtypes,
    outputs: int,
    reference: Callable[[Example, Arrays], object],
    batches: Iterable[Example],
) -> RuntimeCheck:
    """Run the torch model and a runtime on the same batches and compare the outputs.

    Args:
        name: name of the runtime.
        run: runs the exported model.
        inputs: the dtypes of its inputs by name, in the order of forward's tensors.
        outputs: the number of leading results that are the model's outputs.
        reference: returns the torch model's outputs for a batch, and may use the runtime's results.
        batches: arguments for the torch model.

    Raises:
        ExportError: the model has another number of inputs or outputs, or outputs without a finite number.
    """
    squares, total, same, samples = 0.0, 0.0, 0, 0
    for batch in batches:
        found = run(_feeds(inputs, batch))
        with torch.no_grad():
            results = outputs_of(reference(batch, found))
        expected = [x.double().numpy() for x in results if isinstance(x, Tensor)]
        if len(expected) != outputs:
            raise ExportError(f"the file has {outputs} outputs, the model {len(expected)} tensors")
        _check_finite(expected)
        for want, got in zip(expected, found[:outputs], strict=True):
            squares += float(np.square(difference(got, want)).sum())
            total += float(np.square(finite(want)).sum())
            if want.ndim == 2:
                same += int((got.argmax(1) == want.argmax(1)).sum())
                samples += len(want)
    return RuntimeCheck(name, (squares / total) ** 0.5 if total else squares**0.5, same / samples if samples else 1.0)


def _feeds(inputs: Dtypes, batch: Example) -> dict[str, Array]:
    tensors = batch.tensors
    if len(tensors) != len(inputs):
        raise ExportError(f"the file has {len(inputs)} inputs, args and kwargs hold {len(tensors)} tensors")
    feeds = zip(inputs.items(), tensors, strict=True)
    return {name: x.detach().numpy().astype(dtype) for (name, dtype), x in feeds}


def _check_finite(outputs: Sequence[Array]) -> None:
    """Raise if no output is finite: such outputs are equal whatever the weights are."""
    if any(x.size for x in outputs) and not any(np.isfinite(x).any() for x in outputs):
        raise ExportError(
            "the model returns only NaN and infinities for these args, so nothing can be compared; give an example of "
            "its inputs for which it returns numbers"
        )


def check_runtimes(
    file: OnnxFile, target: str, model: nn.Module, batches: Batches, lockstep: Callable[[], Lockstep]
) -> tuple[tuple[RuntimeCheck, ...], tuple[str, ...]]:
    """Check ONNX Runtime on all batches, and ONNX's own evaluator, which is slow, on one sample.

    If one differs from torch, the two run once more in lockstep, except for files with weights beside them.

    Returns:
        The checks, and why a runtime was not compared: the evaluator does not support every file.

    Raises:
        ExportError: a runtime differs from torch.
    """
    types = ((value.name, value.type.tensor_type.elem_type) for value in file.proto.graph.input)
    inputs = {name: onnx.helper.tensor_dtype_to_np_dtype(kind) for name, kind in types}
    compare = partial(_compare, file, inputs, model, lockstep)
    checks = [compare(ONNXRUNTIME, partial(onnxruntime_runner, target=target), batches)]
    notes = []
    if file.path is None:
        try:
            checks.append(
                compare(REFERENCE, reference_runner, [one_sample(dims_of(file.proto.graph), batches[0], model)])
            )
        except LibraryError as error:
            notes.append(f"not compared in {REFERENCE}, which cannot run the file: {error}")
    return tuple(checks), tuple(notes)


def _compare(
    file: OnnxFile,
    inputs: Dtypes,
    model: nn.Module,
    lockstep: Callable[[], Lockstep],
    name: str,
    load: Callable[[onnx.ModelProto | str], Runner],
    batches: Batches,
) -> RuntimeCheck:
    outputs = len(file.proto.graph.output)
    run = load(file.proto if file.path is None else str(file.path))
    check = compare_runtime(name, run, inputs, outputs, lambda batch, _: batch.run(model), batches)
    if not check.ok and file.path is None:
        both = lockstep()
        try:
            exposed = _same_outputs(load(both.proto), run)
            check = compare_runtime(name, exposed, inputs, outputs, both.run, batches)
        except (ExportError, LibraryError) as error:
            raise ExportError(f"{name}: {error}") from error
        check = replace(check, taken_over=both.taken_over)
    if not check.ok:
        raise ExportError(
            f"{name} does not compute the same as torch: relative L2 {check.relative_l2:.2g} (at most "
            f"{RELATIVE_L2:g}), the same top-1 on {check.same_top1:.1%} (at least {SAME_TOP1:.0%})"
        )
    return check


def _same_outputs(exposed: Runner, run: Runner) -> Runner:
    """Return `exposed` with a check that it computes the same outputs as the file itself."""

    def checked(feeds: Mapping[str, Array]) -> Arrays:
        found = exposed(feeds)
        for mine, alone in zip(found, run(feeds), strict=False):
            distance = float(np.linalg.norm(difference(mine, alone)))
            if not distance <= RELATIVE_L2 * float(np.linalg.norm(finite(alone))):
                raise ExportError("its outputs change when its integers are exposed, so these integers prove nothing")
        return found

    return checked
