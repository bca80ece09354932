"""The cost model of products with a sparse operand, fitted to measurements on an H200 by `benchmarks/fit_gpu_cost.py`.

    product   call + rows · depth · lanes · multiplication + depth · step
    pass      copies · (call + bytes · byte)

A product takes the time of a call, and a step for each element of the sum, however many results there are. A pass
prunes, masks or packs an operand, and is counted in copies of it.
"""

from typing import NamedTuple

import torch

from nmcompile.backends.cusparselt.operand import Operand
from nmcompile.backends.cusparselt.support import Sizes
from nmcompile.backends.shared.cost_model import Gemm, Pruned
from nmcompile.backends.triton.support import KEEP


class Product(NamedTuple):
    """Seconds for a call of a kernel, for each multiplication of the dense product, and for each step along the sum."""

    call: float
    multiplication: float
    step: float

    def seconds(self, sizes: Sizes) -> float:
        return self.call + sizes.multiplications * self.multiplication + sizes.depth * self.step


class Copy(NamedTuple):
    """Seconds for a call, and for each byte that is read or written."""

    call: float
    byte: float

    def seconds(self, elements: int, itemsize: int) -> float:
        return self.call + 2 * elements * itemsize * self.byte


DENSE = Product(call=6.198e-6, multiplication=2.432e-15, step=1.388e-9)
SPARSE = Product(call=1.102e-5, multiplication=1.576e-15, step=2.513e-9)
COPY = Copy(call=4.276e-6, byte=2.334e-13)
PRUNE = {"mvue 1:2": 2.8, "mvue 2:4": 1.8, "mvue_approx 2:4": 4.5}
"""Copies of an operand that it costs to prune it, by operator and pattern."""
PACK = {"mvue 2:4": 1.6, "mvue_approx 2:4": 5.8, "greedy 2:4": 1.3}
"""Copies that it costs to prune and pack it in one pass."""
MASK, PACK_KEPT = 1.25, 1.06
"""Copies that it costs to mask an operand, and to mask and pack it."""
FIT = "speed-ups of 40 measured products were off by 5% in the median, and by 15% at most for nine in ten"
"""How far the predictions are off, by `benchmarks/fit_gpu_cost.py`."""
LEAST, REFERENCE = 1.0, 50.0
"""Copies for an operator that was not measured, which reads and writes at least, and for one without a kernel."""


class GpuCosts(NamedTuple):
    """The costs on an H200, as the `CostModel` of all GPUs."""

    dense: Product = DENSE
    sparse: Product = SPARSE
    copy: Copy = COPY
    backend: str = "cusparselt"
    is_gpu: bool = True
    host_seconds: float = 0.0  # a training loop runs ahead of the GPU

    def scaled(self, multiplication: float, byte: float) -> "GpuCosts":
        """Return the costs of a GPU that takes these times as long for a multiplication, and for a byte of memory."""
        dense, sparse = (
            one._replace(multiplication=one.multiplication * multiplication) for one in (self.dense, self.sparse)
        )
        return self._replace(dense=dense, sparse=sparse, copy=self.copy._replace(byte=self.copy.byte * byte))

    def knows(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point

    def dense_seconds(self, gemm: Gemm) -> float:
        return self.dense.seconds(_sizes(gemm))

    def sparse_seconds(self, gemm: Gemm, is_cached: bool) -> float | None:
        return self.sparse.seconds(_sizes(gemm)) if gemm.dtype.itemsize == 2 else None

    def pruning_seconds(self, pruned: Pruned, dtype: torch.dtype, for_sparse: bool) -> float:
        if pruned.is_cached:
            return 0.0
        if pruned.operand == "weight":
            copies = PACK_KEPT if for_sparse else MASK
        elif pruned.has_kernel:
            copies = _copies(pruned.rule, for_sparse, pruned.is_fused)
        else:
            copies = REFERENCE
        return copies * self.copy.seconds(pruned.elements, dtype.itemsize)


def predicted_speedup(sizes: Sizes, operand: Operand, is_cached: bool) -> float | None:
    """Predict dense time / sparse time of one product with its operand's preparation; None for other types of operands.

    Args:
        sizes: of the product.
        operand: the sparse one.
        is_cached: whether its forms for both kernels are kept from call to call.
    """
    if operand.matrix.dtype.itemsize != 2:
        return None
    if operand.operator == KEEP:
        masking, packing = 0.0 if operand.mask is None else MASK, PACK_KEPT
    else:
        masking, packing = (_copies(f"{operand.operator} {operand.pattern}", one, True) for one in (False, True))
    copy = 0.0 if is_cached else COPY.seconds(operand.matrix.numel(), operand.matrix.itemsize)
    return (DENSE.seconds(sizes) + masking * copy) / (SPARSE.seconds(sizes) + packing * copy)


def _copies(rule: str, for_sparse: bool, is_fused: bool) -> float:
    """Return what a kernel that prunes costs, and one that packs the result for the sparse kernel."""
    if for_sparse and is_fused and rule in PACK:
        return PACK[rule]
    return PRUNE.get(rule, LEAST) + (PACK_KEPT if for_sparse else 0.0)


def _sizes(gemm: Gemm) -> Sizes:
    return Sizes(gemm.rows, gemm.depth, gemm.lanes * gemm.groups)
