"""From a captured model to one that runs its three-GEMM graphs, and what it remembers of how it came about."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nmcompile.api.revert_layers import Reverted
from nmcompile.config import CompileConfig, preset
from nmcompile.errors import StateError
from nmcompile.ir.captured import Captured
from nmcompile.three_gemm.frozen import thaw
from nmcompile.weight_cache import forget
from nmcompile.three_gemm.modules import FINALIZED, RECORD, restore, turn_off_fast_path
from nmcompile.ir.plan import DensePhases, Plan
from nmcompile.ir.program import Program
from nmcompile.ir.protocols import Backend
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.passes import compile_passes
from nmcompile.planning.plan_phases import plan_phases
from nmcompile.three_gemm.replace_modules import replace_modules
from nmcompile.training.bind_layers import TripleFactory
from nmcompile.training.earlier import Earlier, never_masked
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.training.optimizer_hooks import watch_optimizers


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


def compilation_of(
    captured: Captured,
    mode: str,
    config: CompileConfig,
    backends: tuple[Backend, ...],
    reverted: Reverted | None = None,
    dense_phases: DensePhases | None = None,
) -> Compilation:
    """Plan a captured model and lower its graphs."""
    plan = plan_phases(captured, preset(mode), config).without(dense_phases or {})
    return Compilation(lowered(captured, plan, backends), mode, config, backends, reverted, dense_phases)


def lowered(captured: Captured, plan: Plan, backends: Sequence[Backend]) -> Program:
    """The graphs of a plan, lowered by the first backend that takes each node."""
    program = Program(captured, plan)
    for one_pass in compile_passes(backends):
        one_pass.run(program)
    return program


def bind_layers(model: nn.Module, done: Compilation, seed: int, earlier: Earlier) -> dict[str, GemmTriple]:
    """The running form of every layer that is rewritten, by name; changes nothing in `model`.

    Its masks, clips and streams are ordinary tensors, also where the caller is in `torch.inference_mode`.
    """
    with torch.inference_mode(False), torch.no_grad():
        factory = TripleFactory(model, done.program, done.config, seed, earlier)
        return {site.layer.name: factory.make(site) for site in factory.rewritten_sites()}


def install_layers(model: nn.Module, done: Compilation, triples: dict[str, GemmTriple]) -> None:
    """Change the module tree, whatever it was compiled to before."""
    forget(list(model.parameters()))
    thaw(model.parameters())
    restore_all(model)
    for module in model.modules():
        module.__dict__.pop(FINALIZED, None)
    replace_modules(model, done.program, triples)
    turn_off_fast_path(model)
    model.__dict__[RECORD] = done
    watch_optimizers()


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
