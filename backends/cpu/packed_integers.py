"""A weight on a grid of four bits: its packed integers, three bits for each weight of a linear layer, and its values.

Both are cached until the weight, its mask or its step is written. The kernel multiplies integers by the integers of the
input: sums are exact, and an instruction multiplies four times as many integers as floats.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from nmcompile.backends.cpu.gemm import masked
from nmcompile.ir.operations import like, to_grid
from nmcompile.native import isa_and_threads, kernels
from nmcompile.quantization import Grid, integers
from nmcompile.weight_cache import WeightCache, is_cacheable

BITS = 4


Packed = TypeVar("Packed")


@dataclass
class Forms(Generic[Packed]):
    """Cached forms of a weight, each empty until it is needed.

    Args:
        values: the kept values on the grid, in the weight's layout.
        packed: the packed integers, or a None if they cannot be packed.
    """

    values: Tensor | None = None
    packed: list[Packed | None] = field(default_factory=list)


_kept: WeightCache[Forms[Any]] = WeightCache()


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
class GridWeight(ABC, Generic[Packed]):
    """The weight `to_grid(apply_mask(weight, mask), step, bits, signed=True)`, made when it is read.

    Args:
        weight: float32.
        mask: bool of that shape, at most two of each four along in-features.
        step: one, or one for each out-feature.
        bits: at most `BITS`.
    """

    weight: Tensor
    mask: Tensor
    step: Tensor
    bits: int

    @property
    @abstractmethod
    def out_features(self) -> int:
        """Return the out-features or out-channels."""

    @property
    @abstractmethod
    def how(self) -> Hashable:
        """Return everything but the tensors that the forms depend on."""

    @abstractmethod
    def pack(self, integers: Tensor) -> Packed | None:
        """Return the packed form of integers, float32 of the weight's shape; None if there is no such form."""

    @cached_property
    def forms(self) -> Forms[Packed]:
        """Return the cached forms, or new ones if the weight may change."""
        others = self.mask, self.step
        return _kept.get(self.weight, others, self.how, Forms) if is_cacheable(self.weight, *others) else Forms()

    def values(self) -> Tensor:
        """Return the values, with the weight's strides, for a kernel without integers."""
        forms = self.forms
        if forms.values is None:
            # An inference tensor has no version counter, which the cache of its packed forms needs.
            with torch.inference_mode(False), torch.no_grad():
                values = to_grid(masked(self.weight, self.mask), self.step, self.bits, True)
                forms.values = like(values, self.weight)
        return forms.values

    def forget_values(self) -> None:
        self.forms.values = None

    def packed(self) -> Packed | None:
        """Return the packed integers; None if they cannot be packed."""
        forms = self.forms
        forms.packed = forms.packed or [self._pack()]
        return forms.packed[0]

    def steps(self, input: GridInput) -> Tensor:
        """Return the steps of the sums, `(out,)`: those of the weight times that of the input."""
        return (self.step * input.step).reshape(-1).expand(self.out_features).contiguous()

    def _pack(self) -> Packed | None:
        """Return the packed integers; None if there is a NaN, or no such form."""
        found = integers(masked(self.weight, self.mask), self.step, Grid(self.bits, signed=True))
        return self.pack(found) if bool(found.isfinite().all()) else None


@dataclass(frozen=True)
class LinearGridWeight(GridWeight["kernels.PackedIntegers"]):
    """The weight of a linear layer, `(out, in)`, or `(in, out)` if `transposed`."""

    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Return out- and in-features."""
        first, second = self.weight.shape
        return (second, first) if self.transposed else (first, second)

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def how(self) -> Hashable:
        return self.bits, self.transposed

    def pack(self, integers: Tensor) -> "kernels.PackedIntegers | None":
        """Return the integers in three bits for each weight; None if some four keep three."""
        matrix = integers.t() if self.transposed else integers
        return kernels.pack_integers(matrix.to(torch.int8).contiguous(), torch.get_num_threads())

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
