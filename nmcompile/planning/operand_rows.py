"""Decisions on how the operands of a layer's three GEMMs are pruned and quantized, within the limits of its sizes."""

from collections.abc import Iterator
from dataclasses import dataclass

from nmcompile.config import Phase
from nmcompile.ir.layers import Layer
from nmcompile.ir.plan import EIGHT, Axis, Operand, PlanRow
from nmcompile.layer_config import LayerConfig, Pruning
from nmcompile.quantization import Grid

ARRIVES = "its input is pruned and quantized where it is computed"


@dataclass(frozen=True)
class OperandPlanner:
    """A planner of rows for the operands of one layer.

    Args:
        layer: the layer.
        is_nonnegative: whether its input is proven non-negative.
        arrives: whether its input is already pruned and quantized where it is computed.
    """

    layer: Layer
    is_nonnegative: bool
    arrives: bool

    def rows(self, phase: Phase, asked: LayerConfig) -> Iterator[PlanRow]:
        """Plan a row for each operand of a GEMM that is asked for, dense ones included."""
        rows = {Phase.FORWARD: self._forward_rows, Phase.BACKWARD: self._backward_rows, Phase.UPDATE: self._update_rows}
        return rows[phase](asked)

    def grid_rows(self, asked: LayerConfig, clip: str, granularity: str) -> Iterator[PlanRow]:
        """Plan the grids of weight and input; `clip` is the operator that finds the input's."""
        name, bits = self.layer.name, asked.weight_bits
        if bits is not None:
            axis: Axis | None = "out" if granularity == "channel" or bits == EIGHT else None
            operator = "largest" if bits == EIGHT else "sawb"
            yield PlanRow(name, Phase.FORWARD, "weight", operator, axis=axis, grid=Grid(bits, signed=True))
        if asked.input_bits is not None and not self.arrives:
            grid = Grid(asked.input_bits, signed=not self.is_nonnegative)
            yield PlanRow(name, Phase.FORWARD, "input", clip_operator(clip, grid), grid=grid)

    def _forward_rows(self, asked: LayerConfig) -> Iterator[PlanRow]:
        operands: tuple[tuple[Operand, Pruning | None], ...] = ("weight", asked.weight), ("input", asked.input)
        for operand, pruning in operands:
            if pruning is None:
                continue
            if not self.layer.fits_forward(pruning.pattern):
                yield self._dense(Phase.FORWARD, _misfit("in", self.layer, pruning))
            elif operand == "input" and self.arrives:
                yield self._dense(Phase.FORWARD, ARRIVES)
            elif operand == "input" and pruning.operator == "greedy_by_value" and not self.is_nonnegative:
                yield self._dense(Phase.FORWARD, "its input is not proven non-negative, so it is not pruned by value")
            else:
                yield self._sparse(Phase.FORWARD, operand, self._weight_operator(pruning), "in")

    def _weight_operator(self, pruning: Pruning) -> Pruning:
        """Fall back to row-wise if tiles do not fit the out-channels: then only the forward GEMM is sparse."""
        if pruning.is_transposable and not self.layer.fits_backward(pruning.pattern):
            return Pruning("greedy", pruning.pattern)
        return pruning

    def _backward_rows(self, asked: LayerConfig) -> Iterator[PlanRow]:
        gradient, weight = asked.backward_gradient, asked.weight
        if gradient is not None:
            if self.layer.fits_backward(gradient.pattern):
                yield self._sparse(Phase.BACKWARD, "grad_output", gradient, "out")
            else:
                yield self._dense(Phase.BACKWARD, _misfit("out", self.layer, gradient))
        if weight is not None:
            if not self.layer.fits_forward(weight.pattern):
                yield self._dense(Phase.BACKWARD, _misfit("in", self.layer, weight))
            elif not weight.is_transposable:
                yield self._dense(Phase.BACKWARD, "a row-wise mask is not N:M along out: dense on the masked weight")
            elif not self.layer.fits_backward(weight.pattern):
                yield self._dense(Phase.BACKWARD, f"{_misfit('out', self.layer, weight)}; the mask is row-wise")
            else:
                yield self._sparse(Phase.BACKWARD, "weight", weight, "out")

    def _update_rows(self, asked: LayerConfig) -> Iterator[PlanRow]:
        gradient = asked.update_gradient
        if gradient is not None:
            yield self._sparse(Phase.UPDATE, "grad_output", gradient, gradient.group)

    def _sparse(self, phase: Phase, operand: Operand, pruning: Pruning, axis: Axis) -> PlanRow:
        return PlanRow(self.layer.name, phase, operand, pruning.operator, pruning.pattern, axis)

    def _dense(self, phase: Phase, reason: str) -> PlanRow:
        return dense_row(self.layer, phase, reason)


def clip_operator(clip: str, grid: Grid) -> str:
    """Return the operator that finds the clip of a grid."""
    return "mse" if clip == "pact" and grid.bits >= EIGHT else clip


def dense_row(layer: Layer, phase: Phase, reason: str) -> PlanRow:
    """Return the row of a GEMM that stays dense, with the reason."""
    return PlanRow(layer.name, phase, reason=reason)


def _misfit(axis: str, layer: Layer, pruning: Pruning) -> str:
    size = layer.in_features if axis == "in" else layer.out_features // layer.groups
    kind = "features" if layer.kind == "linear" else "channels"
    per_group = " per group" if layer.groups > 1 else ""
    return f"{size} {axis}-{kind}{per_group} are not a multiple of {pruning.pattern.block}"
