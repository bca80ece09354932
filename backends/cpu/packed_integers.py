"""A weight on a grid of four bits: its integers packed as 2:4, three bits for each weight, and its values.

Both are cached until the weight, its mask or its step is written. The kernel multiplies integers by the integers of the
input: sums are exact, and an instruction multiplies four times as many integers as floats.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nmcompile.backends.cpu.gemm import masked
from nmcompile.ir.operations import to_grid
from nmcompile.native import isa_and_threads, kernels
from nmcompile.quantization import Grid, integers
from nmcompile.weight_cache import WeightCache, is_cacheable

BITS = 4


@dataclass
class Forms:
    """Cached forms of a weight, each empty until it is needed.

    Args:
        values: the kept values on the grid, in the weight's layout.
        packed: the packed integers, or a None if they cannot be packed.
    """

    values: Tensor | None = None
    packed: "list[kernels.PackedIntegers | None]" = field(default_factory=list)


_kept: WeightCache[Forms] = WeightCache()


class GridInput(NamedTuple):
    """A result of `to_grid`.

    Args:
        values: `(..., in)` float32.
        step: step of the grid, 0-d.
        grid: grid of at most `BITS` bits.
    """

    values: Tensor
    step: Tensor
    grid: Grid

    def codes(self) -> Tensor | None:
        """Return the integers from the grid's lowest one on, uint8 `(tokens, in)`, padded to whole blocks.

        None if a value, such as a NaN, is not on the grid.
        """
        depth, block = self.values.shape[-1], kernels.INTEGERS_DEPTH
        values = self.values.detach().reshape(-1, depth).contiguous()
        codes = values.new_empty(len(values), -(-depth // block) * block, dtype=torch.uint8)
        fits = kernels.code_integers(values, float(self.step), self.grid.low, self.grid.high, codes)
        return codes if fits else None


@dataclass(frozen=True)
class GridWeight:
    """The weight `to_grid(apply_mask(weight, mask), step, bits, signed=True)`, made when it is read.

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
        """Return out- and in-features."""
        first, second = self.weight.shape
        return (second, first) if self.transposed else (first, second)

    @cached_property
    def forms(self) -> Forms:
        """Return the cached forms, or new ones if the weight may change."""
        others = self.mask, self.step
        return _kept.get(self.weight, others, self.bits, Forms) if is_cacheable(self.weight, *others) else Forms()

    def values(self) -> Tensor:
        """Return the values for a kernel without integers."""
        forms = self.forms
        if forms.values is None:
            # An inference tensor has no version counter, which the cache of its packed forms needs.
            with torch.inference_mode(False), torch.no_grad():
                forms.values = to_grid(masked(self.weight, self.mask), self.step, self.bits, True)
        return forms.values

    def forget_values(self) -> None:
        self.forms.values = None

    def multiply(self, input: GridInput, bias: Tensor | None, output: Tensor) -> bool:
        """Write X Wᵀ + b to a contiguous `output`; return False if an operand has no such integers."""
        packed, codes = self.packed(), input.codes()
        # Codes are padded to whole blocks, so the kernel cannot tell a depth from another.
        if packed is None or codes is None or input.values.shape[-1] != self.shape[1]:
            return False
        bias = None if bias is None else bias.contiguous()
        rows = output.view(-1, self.shape[0])
        kernels.multiply_integers(packed, codes, -input.grid.low, self.steps(input), bias, rows, *isa_and_threads())
        return True

    def packed(self) -> "kernels.PackedIntegers | None":
        """Return the packed integers; None if they cannot be packed."""
        forms = self.forms
        forms.packed = forms.packed or [self._pack()]
        return forms.packed[0]

    def steps(self, input: GridInput) -> Tensor:
        """Return the steps of the sums, `(out,)`: those of the weight times that of the input."""
        return (self.step * input.step).reshape(-1).expand(self.shape[0]).contiguous()

    def _pack(self) -> "kernels.PackedIntegers | None":
        """Return the integers in three bits for each weight; None if there is a NaN, or some four keep three."""
        found = integers(masked(self.weight, self.mask), self.step, Grid(self.bits, signed=True))
        if not bool(found.isfinite().all()):
            return None
        matrix = found.t() if self.transposed else found
        return kernels.pack_integers(matrix.to(torch.int8).contiguous(), torch.get_num_threads())
