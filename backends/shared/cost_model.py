"""Predicted times of the GEMMs of a layer, from sizes alone: without a clock all ranks and machines predict the same.

A model knows one kind of device. Its costs are constants that were fitted to measurements on one such machine; on
another machine times differ, and the ratios of times less so.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from nmcompile.backends.shared.choose_kernel import faster, is_small
from nmcompile.ir.plan import Operand


class Gemm(NamedTuple):
    """One GEMM of a layer: for each group a product of a (rows, depth) matrix, which may be sparse, and (depth, lanes).

    Args:
        rows, depth, lanes: sizes of a group's product.
        groups: the number of groups.
        is_linear: whether the layer is linear, not a convolution.
        dtype: of the operands.
    """

    rows: int
    depth: int
    lanes: int
    groups: int
    is_linear: bool
    dtype: torch.dtype

    @property
    def multiplications(self) -> int:
        return math.prod(self[:4])


class Pruned(NamedTuple):
    """An operand that is pruned for a GEMM.

    Args:
        operand: its name.
        elements: their number.
        rule: the operator and the pattern, `"mvue 2:4"`.
        has_kernel: whether a kernel prunes it, not the reference.
        is_fused: whether the sparse kernel prunes it while packing it.
        is_cached: whether its packed or masked form is kept from call to call.
    """

    operand: Operand
    elements: int
    rule: str
    has_kernel: bool
    is_fused: bool
    is_cached: bool


class CostModel(Protocol):
    """Costs of the kernels of one kind of device."""

    @property
    def backend(self) -> str:
        """Return the name of the backend whose sparse kernels it knows."""

    @property
    def is_gpu(self) -> bool:
        """Return whether the rules of a GPU choose the kernel."""

    @property
    def host_seconds(self) -> float:
        """Return by how much a call that prunes takes longer on the host, if that adds to the time of its kernels."""

    def knows(self, dtype: torch.dtype) -> bool:
        """Return whether it knows the kernels for operands of a type."""

    def dense_seconds(self, gemm: Gemm) -> float:
        """Return the time of the dense kernel."""

    def sparse_seconds(self, gemm: Gemm, is_cached: bool) -> float | None:
        """Return the time of the sparse kernel, with packing unless it is cached; None if no kernel takes the type."""

    def pruning_seconds(self, pruned: Pruned, dtype: torch.dtype, for_sparse: bool) -> float:
        """Return the time that it takes to prune an operand for the sparse or the dense kernel."""


def pruned_seconds(model: CostModel, gemm: Gemm, operands: Sequence[Pruned], has_kernel: bool) -> float:
    """Return the time of a GEMM with the pruning of its operands, by the kernel that would be chosen.

    Args:
        model: of the device.
        gemm: the GEMM.
        operands: the pruned ones.
        has_kernel: whether the backend of the model took it.
    """

    def pruning(for_sparse: bool) -> float:
        return sum(model.pruning_seconds(one, gemm.dtype, for_sparse) for one in operands)

    dense = model.dense_seconds(gemm) + pruning(for_sparse=False)
    is_tried = has_kernel and not is_small(gemm.multiplications, model.is_gpu)
    product = model.sparse_seconds(gemm, all(one.is_cached for one in operands)) if is_tried else None
    if product is None:
        return model.host_seconds + dense
    sparse = product + pruning(for_sparse=True)
    kernel, _ = faster(sparse, dense, model.is_gpu)
    return model.host_seconds + (sparse if kernel == "sparse" else dense)
