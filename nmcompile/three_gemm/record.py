"""The record of a compilation, stored on the root of a compiled model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from nmcompile.config import CompileConfig
from nmcompile.errors import StateError
from nmcompile.ir.plan import DensePhases, Reverted
from nmcompile.ir.program import Program
from nmcompile.ir.protocols import Backend
from nmcompile.ir.step_times import StepTimes
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.modules import restore
from nmcompile.three_gemm.triple import GemmTriple

RECORD = "_nmcompile"
"""Attribute of a compiled model that records how it was compiled."""


@dataclass(frozen=True)
class Compilation:
    """Record of a compilation, stored on the root of the compiled model.

    Args:
        program: with its graphs lowered.
        mode, config, backends: as requested.
        reverted: the decision of accuracy control, if it was requested.
        dense_phases: the phases found not to pay; None if that was not requested.
        permutations: by layer name, what an order of its channels won, or why there is none; empty if not requested.
        step_times: of the whole step, if it was timed and is pruned.
    """

    program: Program
    mode: str
    config: CompileConfig
    backends: tuple[Backend, ...]
    reverted: Reverted | None = None
    dense_phases: DensePhases | None = None
    permutations: Mapping[str, str] = field(default_factory=dict)
    step_times: StepTimes | None = None


def restore_all(model: nn.Module) -> None:
    """Restore the plain modules."""
    for module in model.modules():
        restore(module)
        module.__dict__.pop(RECORD, None)


def bypassed_layers(root: nn.Module) -> dict[str, str]:
    """Return the layers of a compiled model that its run did not call and whose weight other code seems to read."""
    suspected = root.__dict__[RECORD].program.captured.suspected
    return {name: suspected[name] for name in never_masked(list(triples_of(root))) if name in suspected}


def record_of(compiled: nn.Module) -> tuple[nn.Module, Compilation]:
    """Return the compiled model, which DDP or torch.compile may wrap, and its record.

    Raises:
        StateError: the model is not compiled.
    """
    for module in compiled.modules():
        if RECORD in module.__dict__:
            return module, module.__dict__[RECORD]
    raise StateError(f"{type(compiled).__name__} is not compiled; use nmcompile.analyze to see what compile would do")


def never_masked(layers: Sequence[GemmTriple]) -> Iterator[str]:
    """Yield the layers of a model that ran which never ran masked, neither here nor where their mask comes from."""
    ran = any(triple.called for triple in layers)
    for triple in layers:
        was_computed = triple.mask is not None and not triple.mask.is_stale
        if ran and not triple.called and not was_computed:
            yield triple.layer.name
