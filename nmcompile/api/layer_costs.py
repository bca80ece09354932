"""The predicted time of each GEMM of a layer, dense and pruned, from its graphs and its number of positions."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from nmcompile.backends.cpu.typical_cost import CpuCosts
from nmcompile.backends.cusparselt.cost import GpuCosts
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.backends.shared.cost_model import CostModel, Gemm, Pruned, pruned_seconds
from nmcompile.config import Phase
from nmcompile.ir.layers import ConvTransposeLayer, Layer, SpatialLayer
from nmcompile.ir.node_meta import NodeMeta
from nmcompile.ir.plan import READ, PlanRow
from nmcompile.ir.program import ThreeGraphs

MODELS: dict[str, CostModel] = {"cpu": CpuCosts(), "cuda": GpuCosts()}
"""The cost models by type of device."""
REFERENCE = ReferenceBackend().name


class Setting(NamedTuple):
    """All that decides the times of a layer beside its graphs.

    Args:
        positions: the layer's output positions in a step.
        device: the type of its device.
        dtype: the type of its operands.
        is_trained: whether a step includes backward, in which weights change.
        passes_gradient: whether backward computes the gradient of its input.
    """

    positions: int
    device: str
    dtype: torch.dtype
    is_trained: bool
    passes_gradient: bool

    def runs(self, phase: Phase) -> bool:
        """Return whether a step runs the GEMM of a phase."""
        return phase is Phase.FORWARD or (self.is_trained and (phase is Phase.UPDATE or self.passes_gradient))


class Seconds(NamedTuple):
    """The times of one GEMM without pruning, and with the pruning of its operands."""

    dense: float
    pruned: float


def predict_phases(three: ThreeGraphs, setting: Setting, model: CostModel | None = None) -> dict[Phase, Seconds] | None:
    """Predict the times of the GEMMs that a step runs; None if a kernel, or what it takes to quantize, is not known.

    The model is that of the type of device unless another is given.
    """
    model = MODELS.get(setting.device) if model is None else model
    gemms = {phase: next(m for m in three.metas(phase) if m.kind == "gemm") for phase in Phase if setting.runs(phase)}
    is_quantized = any(row.is_quantized and row.operand in READ for row in three.plan.rows)
    if model is None or is_quantized or not model.knows(setting.dtype):
        return None
    if any(meta.backend not in (model.backend, REFERENCE) for meta in gemms.values()):
        return None
    return {phase: _seconds(model, three, meta, setting) for phase, meta in gemms.items()}


def _seconds(model: CostModel, three: ThreeGraphs, meta: NodeMeta, setting: Setting) -> Seconds:
    gemm = gemm_of(three.layer, meta.phase, setting.positions, setting.dtype)
    operands, dense = list(_pruned(three, meta, setting)), model.dense_seconds(gemm)
    has_kernel = meta.backend == model.backend
    return Seconds(dense, pruned_seconds(model, gemm, operands, has_kernel) if operands else dense)


def gemm_of(layer: Layer, phase: Phase, positions: int, dtype: torch.dtype) -> Gemm:
    """Return the sizes of a layer's GEMM."""
    outputs, inputs = layer.out_features // layer.groups, layer.in_features
    window = layer.parameters // (layer.out_features * layer.in_features)
    sizes = {
        Phase.FORWARD: (outputs, inputs * window, positions),
        Phase.BACKWARD: (inputs, outputs * window, positions),
        Phase.UPDATE: (outputs, positions, inputs * window),
    }
    return Gemm(*sizes[phase], layer.groups, not isinstance(layer, SpatialLayer), dtype)


def _pruned(three: ThreeGraphs, gemm: NodeMeta, setting: Setting) -> Iterator[Pruned]:
    """Yield the operands that are pruned for a GEMM."""
    for row in three.plan.rows_of(gemm.phase):
        if row.operand in READ and row.pattern is not None:
            is_fused = gemm.fused is not None and gemm.fused.row == row
            pruning = (meta for meta in three.metas(gemm.phase) if meta.row == row)
            has_kernel = is_fused or any(meta.backend != REFERENCE for meta in pruning)
            elements = _elements(three.layer, row, setting)
            is_cached = row.operand == "weight" and not setting.is_trained
            yield Pruned(row.operand, elements, f"{row.operator} {row.pattern}", has_kernel, is_fused, is_cached)


def _elements(layer: Layer, row: PlanRow, setting: Setting) -> int:
    """Return the number of elements of an operand; an image is taken to be as large as its strides say."""
    if row.operand == "weight":
        return layer.parameters
    if row.operand == "grad_output":
        return setting.positions * layer.out_features
    strides = math.prod(layer.stride) if isinstance(layer, SpatialLayer) else 1
    is_smaller = isinstance(layer, ConvTransposeLayer)
    positions = setting.positions // strides if is_smaller else setting.positions * strides
    return positions * layer.in_features * layer.groups
