"""Predicted gains on this CPU and on data-center GPUs, before anything is trained or compiled for them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from nmcompile.api.layer_costs import predict_phases
from nmcompile.api.pipeline import plan_and_lower
from nmcompile.api.predict_phases import setting_of
from nmcompile.api.request import Request
from nmcompile.backends.cpu import CpuBackend
from nmcompile.backends.cpu.cost import costs_here
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.typical_cost import FIT as CPU_FIT
from nmcompile.backends.cpu.typical_cost import CpuCosts
from nmcompile.backends.cusparselt import CusparseltBackend
from nmcompile.backends.cusparselt.cost import FIT as GPU_FIT
from nmcompile.backends.cusparselt.cost import GpuCosts
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.backends.shared.cost_model import CostModel
from nmcompile.backends.triton import TritonBackend
from nmcompile.ir.prediction import Prediction
from nmcompile.ir.protocols import Backend

ON_CPU: tuple[Backend, ...] = (CpuBackend(), ReferenceBackend())
ON_GPU: tuple[Backend, ...] = (TritonBackend(), CusparseltBackend(), ReferenceBackend())


class DataSheet(NamedTuple):
    """Figures of a GPU's data sheet: dense bfloat16 TFLOP/s of its tensor cores, and TB/s of its memory."""

    tflops: float
    bandwidth: float


H200 = DataSheet(989.0, 4.8)
SCALED = {"H100 SXM": DataSheet(989.0, 3.35), "A100 80 GB SXM": DataSheet(312.0, 2.039)}
"""GPUs that nothing was measured on."""


class Machine(NamedTuple):
    """A machine to predict for: the costs of its kernels, the backends that run there, and the type of its operands."""

    name: str
    model: CostModel
    backends: tuple[Backend, ...]
    device: str
    dtype: torch.dtype | None
    basis: str


def machines() -> Iterator[Machine]:
    """Yield the machines, this one first; its products are timed once per process, in less than a second."""
    if kernel_support().ok:
        threads = torch.get_num_threads()
        name = f"this CPU ({threads} thread{'s' if threads > 1 else ''})"
        basis = f"products timed now, pruning as on a Zen 4; {CPU_FIT}"
        yield Machine(name, CpuCosts(costs_here(threads)), ON_CPU, "cpu", None, basis)
    gpu = ON_GPU, "cuda", torch.bfloat16
    yield Machine("H200, bfloat16", GpuCosts(), *gpu, f"fitted to measurements on an H200; {GPU_FIT}")
    for name, sheet in SCALED.items():
        model = GpuCosts().scaled(H200.tflops / sheet.tflops, H200.bandwidth / sheet.bandwidth)
        yield Machine(f"{name}, bfloat16", model, *gpu, "scaled from the H200's by data-sheet figures, not measured")


def predict_gains(request: Request) -> tuple[Prediction, ...]:
    """Predict the time of all GEMMs of a step, dense and pruned, on each machine whose costs are known.

    Layers whose sizes or kernels no model knows, and quantized ones, are left out; so is a machine without any other.
    """
    found = ((machine, list(_seconds(request, machine))) for machine in machines())
    return tuple(
        Prediction(machine.name, sum(dense for dense, _ in times), sum(pruned for _, pruned in times), machine.basis)
        for machine, times in found
        if times
    )


def _seconds(request: Request, machine: Machine) -> Iterator[tuple[float, float]]:
    """Yield the times of each GEMM on a machine."""
    program = plan_and_lower(replace(request, backends=machine.backends)).program
    for three in program.layers.values():
        setting = setting_of(request, program, three)
        if setting is not None:
            there = setting._replace(device=machine.device, dtype=machine.dtype or setting.dtype)
            yield from (predict_phases(three, there, machine.model) or {}).values()
