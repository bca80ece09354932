"""The native kernels as operators on tensors. Where a kernel cannot run, its operator runs the reference."""

import functools

import torch
from torch import Tensor

from nmcompile.ir.protocols import Support
from nmcompile.pruning import NMPattern, check, mvue

DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
WORD = 2**64 - 1  # a key as an unsigned number


@functools.cache
def kernel_support() -> Support:
    """Whether the compiled module is there; never raises."""
    try:
        from nmcompile import _kernels
    except ImportError as error:
        return Support(False, f"nmcompile._kernels cannot be imported ({error}); reinstall nmcompile with a compiler")
    return Support(True, f"native kernels for blocks of at most {_kernels.MAX_BLOCK} elements")


def block_support(block: int) -> Support:
    """Whether the compiled module takes blocks of M = `block` elements."""
    support = kernel_support()
    if not support.ok:
        return support
    from nmcompile import _kernels

    if block > _kernels.MAX_BLOCK:
        return Support(False, f"blocks of {block} elements; the kernel takes at most {_kernels.MAX_BLOCK}")
    return support


@torch.library.custom_op("nmcompile::cpu_mvue", mutates_args=())
def _cpu_mvue(x: Tensor, n_keep: int, block: int, dim: int, key: Tensor) -> Tensor:
    """`nmcompile.pruning.mvue.prune(x, n_keep:block, dim, key)`, bit for bit.

    Args:
        x: any shape, strides and device; float64, float32, bfloat16 or float16.
        n_keep: N.
        block: M.
        dim: the dim along which blocks run.
        key: 64 bits, 0-d int64.
    """
    pattern = NMPattern(n_keep, block)
    if not _kernel_takes(x, block, key):
        return mvue.prune(x, pattern, dim, key)
    from nmcompile import _kernels

    result = torch.empty_like(x, requires_grad=False)
    dense = x.detach().resolve_neg()
    threads = torch.get_num_threads()
    _kernels.mvue(dense, result, check(x, dim), n_keep, block, int(key) & WORD, threads)
    return result


@_cpu_mvue.register_fake
def _(x: Tensor, n_keep: int, block: int, dim: int, key: Tensor) -> Tensor:
    return torch.empty_like(x)


cpu_mvue = torch.ops.nmcompile.cpu_mvue.default


def _kernel_takes(x: Tensor, block: int, key: Tensor) -> bool:
    """False also for operands that are wrong: the reference says what is wrong with them."""
    on_cpu = x.device.type == "cpu" and x.layout == torch.strided
    keyed = key.dtype == torch.int64 and key.dim() == 0
    return on_cpu and x.dtype in DTYPES and keyed and block_support(block).ok
