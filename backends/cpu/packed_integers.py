"""A weight on a grid of four bits: its integers packed as 2:4, three bits for each weight, and its values.

What was made of a weight at rest is kept until it, its mask or its step is written. The kernel multiplies integers by
the integers of the input: sums are exact, and an instruction multiplies four times as many as of floats.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nmcompile.backends.cpu.gemm import masked
from nmcompile.ir.operations import to_grid
from nmcompile.native import isa_and_threads, kernels
from nmcompile.quantization import Grid, integers
from nmcompile.weight_cache import WeightCache, is_cacheable

BITS = 4


@dataclass
class Forms:
    """What is kept of a weight: nothing before somebody asks for it.

    Args:
        values: those that are left on the grid, as the weight lies.
        packed: the packed integers, or a None where they cannot be packed.
    """

    values: Tensor | None = None
    packed: "list[kernels.PackedIntegers | None]" = field(default_factory=list)


_kept: WeightCache[Forms] = WeightCache()


class GridInput(NamedTuple):
    """What `to_grid` gave.

    Args:
        values: `(..., in)` float32.
        step: of the grid, 0-d.
        grid: of at most `BITS` bits.
    """

    values: Tensor
    step: Tensor
    grid: Grid

    def codes(self) -> Tensor | None:
        """The integers from the grid's lowest one on, uint8 `(tokens, in)`, filled up to whole blocks.

        None where a value, such as a NaN, is not on the grid.
        """
        found = integers(self.values, self.step, self.grid)
        if not torch.equal(found * self.step, self.values):
            return None
        codes = (found - self.grid.low).to(torch.uint8).reshape(-1, self.values.shape[-1])
        return F.pad(codes, (0, -codes.shape[1] % kernels.INTEGERS_DEPTH)).contiguous()


@dataclass(frozen=True)
class GridWeight:
    """`to_grid(apply_mask(weight, mask), step, bits, signed=True)`, made when it is read.

    Args:
        weight: `(out, in)`, or `(in, out)` if `transposed`, float32.
        mask: bool of that shape, at most two of each four along in-features.
        step: one, or one for each out-feature.
        bits: at most `BITS`.
    """

    weight: Tensor
    mask: Tensor
    step: Tensor
    bits: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Out- and in-features."""
        first, second = self.weight.shape
        return (second, first) if self.transposed else (first, second)

    @cached_property
    def forms(self) -> Forms:
        """Where its forms are kept; of a weight that may change, nowhere."""
        others = self.mask, self.step
        return _kept.get(self.weight, others, self.bits, Forms) if is_cacheable(self.weight, *others) else Forms()

    def values(self) -> Tensor:
        """What a kernel without integers reads."""
        forms = self.forms
        if forms.values is None:
            # An inference tensor would have no version counter, by which packed forms of it are kept.
            with torch.inference_mode(False), torch.no_grad():
                forms.values = to_grid(masked(self.weight, self.mask), self.step, self.bits, True)
        return forms.values

    def forget_values(self) -> None:
        self.forms.values = None

    def multiply(self, input: GridInput, bias: Tensor | None, output: Tensor) -> bool:
        """Write X Wᵀ + b to a contiguous `output`; False where one of the operands has no such integers."""
        forms, out_features = self.forms, self.shape[0]
        forms.packed = forms.packed or [self._pack()]
        (packed,), codes = forms.packed, input.codes()
        if packed is None or codes is None:
            return False
        steps = (self.step * input.step).reshape(-1).expand(out_features).contiguous()
        bias = None if bias is None else bias.contiguous()
        rows = output.view(-1, out_features)
        kernels.multiply_integers(packed, codes, -input.grid.low, steps, bias, rows, *isa_and_threads())
        return True

    def _pack(self) -> "kernels.PackedIntegers | None":
        """The integers in three bits for each weight; None where a NaN is no integer, or some four keep three."""
        found = integers(masked(self.weight, self.mask), self.step, Grid(self.bits, signed=True))
        if not bool(found.isfinite().all()):
            return None
        matrix = found.t() if self.transposed else found
        return kernels.pack_integers(matrix.to(torch.int8).contiguous(), torch.get_num_threads())
