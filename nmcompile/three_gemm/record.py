"""The record of a compilation, kept on the root of a compiled model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from nmcompile.config import CompileConfig
from nmcompile.errors import StateError
from nmcompile.ir.plan import DensePhases, Reverted
from nmcompile.ir.program import Program
from nmcompile.ir.protocols import Backend
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.modules import RECORD, restore
from nmcompile.three_gemm.triple import GemmTriple


@dataclass(frozen=True)
class Compilation:
    """Kept on the root of a compiled model.

    Args:
        program: with its graphs lowered.
        mode, config, backends: that were asked for.
        reverted: what accuracy control decided, if it was asked to.
        dense_phases: what was found not to pay; None if nobody asked.
    """

    program: Program
    mode: str
    config: CompileConfig
    backends: tuple[Backend, ...]
    reverted: Reverted | None = None
    dense_phases: DensePhases | None = None


def restore_all(model: nn.Module) -> None:
    """The plain modules again."""
    for module in model.modules():
        restore(module)
        module.__dict__.pop(RECORD, None)


def bypassed_layers(root: nn.Module) -> dict[str, str]:
    """The layers of a compiled model that ran whose weight other code seems to read: the run did not call them."""
    suspected = root.__dict__[RECORD].program.captured.suspected
    return {name: suspected[name] for name in never_masked(list(triples_of(root))) if name in suspected}


def record_of(compiled: nn.Module) -> tuple[nn.Module, Compilation]:
    """The compiled model, which DDP or torch.compile may wrap, and its record.

    Raises:
        StateError: the model is not compiled.
    """
    for module in compiled.modules():
        if RECORD in module.__dict__:
            return module, module.__dict__[RECORD]
    raise StateError(f"{type(compiled).__name__} is not compiled; use nmcompile.analyze to see what compile would do")


def never_masked(layers: Sequence[GemmTriple]) -> Iterator[str]:
    """The layers of a model that ran that have never run masked: neither here, nor where their mask was loaded from."""
    ran = any(triple.called for triple in layers)
    for triple in layers:
        was_computed = triple.mask is not None and not triple.mask.is_stale
        if ran and not triple.called and not was_computed:
            yield triple.layer.name
