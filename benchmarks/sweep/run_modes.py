"""The three modes of one architecture, each judged by something that nmcompile did not compute.

"dense"      outputs and gradients equal eager's, bit for bit, in train() and in eval()
"training"   a step's loss is finite, `verify` finds the patterns, and the finalized plain model computes the same
"inference"  ONNX Runtime computes from the file what the module does, at another batch size than it was written with
"""

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import nmcompile
from benchmarks.sweep.architecture import Architecture, Inputs
from nmcompile.errors import NMCompileError
from nmcompile.report.report import Report

BATCH, OTHER_BATCH = 2, 3
SEED = 1
ROUNDING = 1e-6
"""Relative L2 difference of two float32 models that sum in another order."""
FLIPS = 0.1
"""Relative L2 difference that activations of 4 bits reach if some are rounded to the next step, layer after layer.

`export` has compared the file in lockstep before, also at another batch size.
"""


PATH = re.compile(r"/\S*/")
VERDICTS = {
    "ok": "all of the mode's checks hold",
    "wrong": "a result is not what it must be",
    "differs": "`export` verified the file in lockstep, but ONNX Runtime's outputs are further apart than 0.1",
    "not compiled": "`compile` raised an error",
    "refused": "`finalize`, `export` or another step after `compile` said that it does not support the model",
    "failed": "another error after `compile`, such as one of a library",
    "lost": "the process reached a limit on time or memory, or crashed",
}
"""The meaning of the first words of a verdict."""


class Wrong(Exception):
    """A result that is not what it must be."""


class Differs(Exception):
    """Outputs further apart than rounding to another step of a grid usually takes them."""


class NotCompiled(Exception):
    """An error of `compile`."""


def check(holds: bool, claim: str) -> None:
    """Raise `Wrong` unless the claim holds."""
    if not holds:
        raise Wrong(claim)


def floats(output: object) -> list[Tensor]:
    """Return the floating-point tensors of a model's output."""
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Call a model, its dropout seeded; gradients stay on, as torch's encoders sum in another order without them."""
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    args, kwargs = inputs
    return floats(model(*args, **kwargs))


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    """Return a loss that every output takes part in."""
    return torch.stack([output.float().square().mean() for output in outputs if output.requires_grad]).sum()


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative L2 difference; infinities that both have count as equal."""
    pairs = [(torch.nan_to_num(a.detach()), torch.nan_to_num(b.detach())) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).norm() / (b.norm() + 1e-12)) for a, b in pairs)


def same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Return whether two lists of tensors are equal bit for bit, NaN included."""
    pairs = list(zip(found, expected, strict=True))
    return all(a is b or (a is not None and b is not None and _equal(a, b)) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a.detach()), torch.nan_to_num(b.detach()))


def made(architecture: Architecture) -> nn.Module:
    """Return the architecture's model with the same random weights each time; no matrix of it is zero.

    A head that starts at zero would pass no gradient.
    """
    torch.manual_seed(0)
    model = architecture.make()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def compiled(architecture: Architecture, mode: str, inputs: Inputs, **options: Any) -> nn.Module:
    """Compile a new model of the architecture with example inputs."""
    model = made(architecture)
    try:
        return nmcompile.compile(model.eval(), mode, args=inputs[0], kwargs=inputs[1], **options)
    except Exception as error:
        raise NotCompiled(f"{type(error).__name__}: {error}") from error


def _inputs(architecture: Architecture, batch: int) -> Inputs:
    torch.manual_seed(batch)
    return architecture.inputs(batch)


def check_dense(architecture: Architecture) -> None:
    """Compile in mode "dense" and compare outputs and gradients with eager, bit for bit."""
    eager, inputs = made(architecture), _inputs(architecture, BATCH)
    dense = compiled(architecture, "dense", inputs)
    check(same(run(dense.eval(), inputs), run(eager.eval(), inputs)), "outputs in eval() differ from eager's")
    found, expected = run(dense.train(), inputs), run(eager.train(), inputs)
    check(same(found, expected), "outputs in train() differ from eager's")
    for outputs in (found, expected):
        loss_of(outputs).backward()
    gradients = [[parameter.grad for parameter in one.parameters()] for one in (dense, eager)]
    check(same(*gradients), "gradients differ from eager's")


def check_training(architecture: Architecture) -> Report:
    """Train for a step in mode "training", compare with the finalized model, and return the report on the model."""
    inputs = _inputs(architecture, BATCH)
    sparse = compiled(architecture, "training", inputs)
    loss = loss_of(run(sparse.train(), inputs))
    check(bool(loss.isfinite()), "the loss is not finite")
    loss.backward()
    torch.optim.SGD(sparse.parameters(), 1e-3).step()
    trained = run(sparse.eval(), inputs)
    check(nmcompile.verify(sparse).ok, "verify finds broken blocks in the compiled model")
    report = nmcompile.inspect(sparse)
    final = nmcompile.finalize(sparse).eval()
    check(nmcompile.verify(final).ok, "verify finds broken blocks in the finalized model")
    apart = distance(run(final, inputs), trained)
    check(apart <= ROUNDING, f"the finalized model differs by {apart:.1e}")
    return report


def check_inference(architecture: Architecture) -> None:
    """Calibrate, export, and compare ONNX Runtime with the module at the batch size of the export and at another."""
    args, kwargs = inputs = _inputs(architecture, BATCH)
    small = compiled(architecture, "inference", inputs, calibration=[kwargs or args]).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        nmcompile.export(small, path, args, kwargs=kwargs)
        check(nmcompile.verify(path).ok, "verify finds broken blocks in the file")
        others = _inputs(architecture, OTHER_BATCH)
        with torch.no_grad():
            expected = run(small, others)
        apart = distance(run_file(path, others), expected)
    if not apart <= FLIPS:
        raise Differs(f"ONNX Runtime differs by {apart:.1e} at batch size {OTHER_BATCH}")


def run_file(path: Path, inputs: Inputs) -> list[Tensor]:
    """Run an ONNX file in ONNX Runtime and return its floating-point outputs."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    feeds = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), given, strict=True)}
    return floats([torch.from_numpy(array) for array in session.run(None, feeds)])


def verdict(mode: Callable[[Architecture], object], architecture: Architecture) -> tuple[str, object]:
    """Run a mode; return its verdict and its result.

    A verdict is one of `VERDICTS`, with the reason.
    """
    try:
        return "ok", mode(architecture)
    except Wrong as error:
        return f"wrong: {error}", None
    except Differs as error:
        return f"differs: {error}", None
    except NotCompiled as error:
        return f"not compiled: {_line(error)}", None
    except NMCompileError as error:
        return f"refused: {_line(error)}", None  # export also refuses a file that computes something else
    except Exception as error:
        return f"failed: {type(error).__name__}: {_line(error)}", None


def _line(error: Exception) -> str:
    return " ".join(PATH.sub("", str(error)).split())[:200]
