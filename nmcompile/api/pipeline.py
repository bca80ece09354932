"""The steps from a captured model to one that runs its three-GEMM graphs, and the record of the compilation."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from nmcompile.api.request import Request
from nmcompile.config import CompileConfig, preset
from nmcompile.ir.captured import Captured
from nmcompile.ir.plan import DensePhases, Plan
from nmcompile.ir.program import Program
from nmcompile.ir.protocols import Backend
from nmcompile.passes import compile_passes
from nmcompile.planning.plan_phases import plan_phases
from nmcompile.three_gemm.adapter_merging import refuse_merging
from nmcompile.three_gemm.fast_paths import close_fast_paths
from nmcompile.three_gemm.frozen import thaw
from nmcompile.three_gemm.record import RECORD, Compilation, restore_all
from nmcompile.three_gemm.replace_modules import replace_modules
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.training.bind_layers import TripleFactory
from nmcompile.training.earlier import Earlier
from nmcompile.training.finalized import FINALIZED
from nmcompile.training.optimizer_hooks import watch_optimizers
from nmcompile.weight_cache import forget


def plan_and_lower(request: Request) -> Compilation:
    """Plan each layer, and write its three graphs."""
    config, backends, dense_phases = request.config, request.backends, request.dense_phases
    program = _program(request.captured, request.mode, config, backends, dense_phases)
    found = request.reverted, dense_phases, request.permutations, request.step_times
    return Compilation(program, request.mode, config, backends, *found)


def plan_again(done: Compilation, dense_phases: DensePhases) -> Compilation:
    """Plan and lower a compiled model once more, with other phases left dense."""
    program = _program(done.program.captured, done.mode, done.config, done.backends, dense_phases)
    return replace(done, program=program, dense_phases=dense_phases)


def _program(
    captured: Captured,
    mode: str,
    config: CompileConfig,
    backends: Sequence[Backend],
    dense_phases: DensePhases | None,
) -> Program:
    plan = plan_phases(captured, preset(mode), config).without(dense_phases or {})
    return lowered(captured, plan, backends)


def lowered(captured: Captured, plan: Plan, backends: Sequence[Backend]) -> Program:
    """Return the graphs of a plan, lowered by the first backend that takes each node."""
    program = Program(captured, plan)
    for one_pass in compile_passes(backends):
        one_pass.run(program)
    return program


def bind_layers(model: nn.Module, done: Compilation, seed: int, earlier: Earlier) -> dict[str, GemmTriple]:
    """Return the running form of every rewritten layer, by name; change nothing in `model`.

    Its masks, clips and streams are ordinary tensors, also if the caller is in `torch.inference_mode`.
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
    close_fast_paths(model)
    refuse_merging(model)
    model.__dict__[RECORD] = done
    watch_optimizers()
