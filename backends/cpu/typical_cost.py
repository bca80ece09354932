"""The cost model of a typical processor, which no clock has a part in: its costs are those of one Zen 4.

The products are those of `nmcompile.backends.cpu.cost`, with costs that `benchmarks/fit_cpu_cost.py` fitted to
float32 GEMMs of two threads. A pass over an operand, which prunes or masks it, is counted in copies.
"""

from typing import NamedTuple

import torch

from nmcompile.backends.cpu.cost import Costs, dense_seconds, sparse_seconds
from nmcompile.backends.shared.cost_model import Gemm, Pruned

TYPICAL = Costs(linear=1.04e-11, convolution=9.11e-12, read=2.51e-10, sparse=8.3e-11, pack=5.82e-10, copy=1.22e-10)
COPIED_BYTE = 2.8e-11  # seconds for each byte that a copy reads or writes
COPIES = {
    "mvue 1:2": 1.0,
    "mvue 2:4": 1.3,
    "mvue 4:8": 2.2,
    "mvue_approx 2:4": 1.7,
    "greedy 2:4": 0.8,
    "greedy_by_value 4:8": 1.3,
}
"""Copies of an operand that it costs to prune it, by operator and pattern."""
DRAWS = 0.9  # copies for pruning an operand that the sparse kernel packs anyway
MASK, OTHERS, REFERENCE = 1.6, 2.0, 50.0
"""Copies for masking a weight, for an operator that was not measured, and for one without a kernel."""
CALL, HOST = 2e-5, 5e-5
"""Seconds of Python for a dense GEMM, and how much more it takes to prune."""
FIT = "speed-ups of 54 measured products were off by 6% in the median, and by 22% at most for nine in ten"
"""How far the predictions are off, by `benchmarks/fit_cpu_cost.py`."""


class CpuCosts(NamedTuple):
    """The costs on a typical processor, as the `CostModel` of all CPUs; `costs` are those of its products."""

    costs: Costs = TYPICAL
    backend: str = "cpu"
    is_gpu: bool = False
    host_seconds: float = HOST

    def knows(self, dtype: torch.dtype) -> bool:
        return dtype != torch.bfloat16  # whose kernels depend on the processor

    def dense_seconds(self, gemm: Gemm) -> float:
        return CALL + gemm.groups * dense_seconds(self.costs, *gemm[:3], gemm.is_linear)

    def sparse_seconds(self, gemm: Gemm, is_cached: bool) -> float | None:
        if gemm.dtype != torch.float32:
            return None
        return CALL + gemm.groups * sparse_seconds(self.costs, *gemm[:3], is_cached)

    def pruning_seconds(self, pruned: Pruned, dtype: torch.dtype, for_sparse: bool) -> float:
        return _copies(pruned, for_sparse) * 2 * pruned.elements * dtype.itemsize * COPIED_BYTE


def _copies(pruned: Pruned, for_sparse: bool) -> float:
    if pruned.is_cached:
        return 0.0
    if pruned.operand == "weight":
        return 0.0 if for_sparse else MASK  # the sparse kernel masks what it packs
    if for_sparse and pruned.is_fused:
        return DRAWS
    return COPIES.get(pruned.rule, OTHERS) if pruned.has_kernel else REFERENCE
