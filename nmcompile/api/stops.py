"""Layers that run with solved weights, and stop where theirs is not solved yet."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nmcompile.api.solved_parts import Part, Solved, holds
from nmcompile.backends.reference.backend import GEMMS
from nmcompile.backends.shared.gemm_arguments import geometry
from nmcompile.config import Phase
from nmcompile.ir import operations as ops
from nmcompile.ir.layers import ConvLayer, ConvTransposeLayer, Layer, LinearLayer
from nmcompile.ir.plan import PlanRow
from nmcompile.one_shot.rounding import Rounding
from nmcompile.pausable import pause
from nmcompile.pruning.pattern import NMPattern
from nmcompile.quantization import Grid
from nmcompile.three_gemm.observer import Results, Values
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.three_gemm.unquantized import Steps, Unquantized
from nmcompile.training.masks import WeightMask


@dataclass(frozen=True)
class Stop:
    """A call of a layer that waits until its weight is solved.

    `version` is that of the input when the call came: code between two layers may write into it. `step` is that of the
    weight's grid, None if the weight is not quantized.
    """

    part: Part
    triple: GemmTriple
    weight: Tensor
    bias: Tensor | None
    dense_input: Tensor
    version: int
    step: Tensor | None

    @property
    def layer(self) -> Layer:
        """Return the layer, with the rows of the weight that this call reads; the input is padded already."""
        layer = replace(self.triple.layer, weight_shape=tuple(self.weight.shape))
        return replace(layer, pad_before=()) if isinstance(layer, ConvLayer) else layer

    @property
    def row(self) -> PlanRow:
        """Return the row of the plan that prunes the weight."""
        row = self.triple.graphs.plan.find(Phase.FORWARD, "weight")
        assert row is not None
        return row

    @property
    def rounding(self) -> Rounding | None:
        """Return the grid of the weight; None if it is not quantized."""
        grid = self.triple.steps.weight_grid
        return None if grid is None or self.step is None else Rounding(grid, self.step)

    def fits(self, pattern: NMPattern) -> bool:
        """Return whether blocks of a pattern divide the channels along which the mask is N:M."""
        return self.layer.fits_forward(pattern) and (not self.row.is_transposable or self.layer.fits_backward(pattern))

    def pruned_input(self) -> Tensor:
        """Return the input pruned, if the plan prunes it."""
        return self._pruned(self.dense_input)

    def _pruned(self, x: Tensor) -> Tensor:
        row = self._pruning()
        if row is None or row.pattern is None or row.operator is None:
            return x
        mask = ops.prune_mask(x, row.operator, row.pattern.n_keep, row.pattern.block, self.triple.layer.channel_dim)
        return ops.apply_mask(x, mask)

    def input(self, clip: float | None) -> Tensor:
        """Return the input as the GEMM reads it: rounded if there is a clip, and then pruned if the plan prunes it."""
        x, grid = self.dense_input, self.grid
        if grid is not None and clip:
            x = ops.to_grid(x, torch.tensor(clip / grid.high, device=x.device), grid.bits, grid.signed)
        return self._pruned(x)

    @property
    def grid(self) -> Grid | None:
        """Return the grid of the input; None if it is not quantized."""
        return None if self.triple.steps.input is None else self.triple.steps.input.grid

    def reads_same(self, other: "Stop") -> bool:
        """Return whether two linear layers read one tensor, as the projections to queries, keys and values do."""
        are_alike = all(isinstance(stop.triple.layer, LinearLayer) and not stop._pruning() for stop in (self, other))
        is_one = self.dense_input is other.dense_input and self.version == other.version
        return are_alike and is_one and self.grid == other.grid

    def _pruning(self) -> PlanRow | None:
        return self.triple.graphs.plan.find(Phase.FORWARD, "input")


def mask_name(triple: GemmTriple) -> str:
    """Return the name of the weight that a layer's mask belongs to: one name for all layers that share a weight."""
    assert isinstance(triple.mask, WeightMask)
    return triple.mask.name


def goes_by_magnitude(layer: Layer) -> bool:
    """Return whether a layer's mask goes by magnitude, whatever the method.

    The products of a transposed convolution overlap in its output, which no matrix of input rows shows.
    """
    return isinstance(layer, ConvTransposeLayer)


_is_dense: ContextVar[bool] = ContextVar("whether layers run as in the dense model", default=False)


@contextmanager
def dense_layers() -> Iterator[None]:
    """Run observed layers as those of the dense model inside this context."""
    token = _is_dense.set(True)
    try:
        yield
    finally:
        _is_dense.reset(token)


class Replacing(Unquantized):
    """An observer that runs a layer as it was solved, or with its dense weight if that is not solved."""

    def __init__(self, triple: GemmTriple, solved: Mapping[Part, Solved]) -> None:
        super().__init__(triple)
        self.solved = solved

    def run(self, phase: Phase, values: Values) -> Results:
        weight, mask = values["weight"], values.get("weight_mask")
        if mask is None or weight is None:
            return super().run(phase, values)
        found = self.solved.get(self.part_of(mask))
        if found is None:
            return super().run(phase, {**values, "weight_mask": torch.ones_like(mask)})
        return self.run_without(self._open_steps(found), phase, {**values, **self._values(found, values, weight)})

    def _values(self, found: Solved, values: Values, weight: Tensor) -> dict[str, Tensor | None]:
        """Return the operands that the solution gives."""
        new = weight if found.weight is None else found.weight.to(weight)
        given = {"weight": new, "weight_mask": found.mask.to(weight.device), "weight_step": values.get("weight_step")}
        if found.step is not None and holds(self.triple.steps.weight_grid, found):
            given["weight_step"] = found.step.to(weight.device)
        bias, step = values.get("bias"), self.triple.steps.input
        if found.bias is not None and bias is not None:
            given["bias"] = found.bias.to(bias)
        if found.clip is not None and step is not None:
            given["input_step"] = torch.tensor(found.clip / step.grid.high, device=weight.device)
        return given

    def _open_steps(self, found: Solved) -> Steps:
        """Return the steps whose clips are not known, by operand."""
        return {operand: step for operand, step in self.steps.items() if operand != "input" or found.clip is None}

    def part_of(self, mask: Tensor) -> Part:
        """Return the part of the weight that a call reads; the mask is a tensor of its own, or some rows of one."""
        return Part(mask_name(self.triple), int(mask.storage_offset()) // int(mask.stride(0)))


class Waiting(Replacing):
    """An observer that stops at a layer until its weight is solved; a weight that stays unsolved runs dense.

    Inside `dense_layers` it stops there too, and then runs the layer of the dense model.
    """

    def run(self, phase: Phase, values: Values) -> Results:
        weight, mask, input = values["weight"], values.get("weight_mask"), values.get("input")
        if mask is not None and weight is not None and input is not None and self._fits(input):
            part = self.part_of(mask)
            if part not in self.solved:
                stop = Stop(
                    part, self.triple, weight, values.get("bias"), input, input._version, values.get("weight_step")
                )
                pause(stop)
        if _is_dense.get() and weight is not None and input is not None:
            return (_dense_output(self.triple.layer, input, weight, values.get("bias")),)
        return super().run(phase, values)

    def _fits(self, input: Tensor) -> bool:
        """Return whether the input tells something about the weight: another layer's error is its own to raise."""
        layer = self.triple.layer
        if goes_by_magnitude(layer):
            return False
        return bool(input.numel()) and input.shape[layer.channel_dim] == layer.in_features * layer.groups


def _dense_output(layer: Layer, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the output of a layer that nothing is pruned or rounded in, from its prepared input."""
    return GEMMS[ops.gemm_forward, type(layer)](input, weight, bias, *geometry(layer))
