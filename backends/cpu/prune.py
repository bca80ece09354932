"""The pruning operators by native kernels. If a kernel cannot run, its operator runs the reference.

Results equal those of `nmcompile.pruning.OPERATORS[operator].prune(x, pattern, dim, key)` bit for bit and draw for
draw, whatever the number of threads; with `relu`, those for `torch.relu(x)`.
"""

from functools import cache, lru_cache

import torch
from torch import Tensor

from nmcompile.backends.cpu.kernels import kernel_support, takes
from nmcompile.custom_op import ANY_STRIDES, custom_op
from nmcompile.errors import OperandError
from nmcompile.ir.grouping import grouped
from nmcompile.ir.operations import like
from nmcompile.ir.protocols import Support
from nmcompile.native import isa_and_threads, kernels, lend
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.references import OPERATORS
from nmcompile.spare_memory import empty_like

PRUNE_MASK = "nmcompile::cpu_prune_mask"
WORD = 2**64 - 1  # a key as an unsigned number
RANKING = frozenset({"greedy", "greedy_by_value"})
NATIVE = RANKING | {"mvue", "mvue_approx"}

pattern_of = lru_cache(NMPattern)
"""Return the pattern N:M; checking the numbers takes as long as pruning a small tensor."""


@cache
def prune_support(operator: str, n_keep: int, block: int) -> Support:
    """Return whether the compiled module has the operator for the pattern N:M = `n_keep`:`block`."""
    support = kernel_support()
    if not support.ok:
        return support
    if operator not in NATIVE:
        return Support(False, f"no native kernel for operator {operator!r}, only for {', '.join(sorted(NATIVE))}")
    if operator == "mvue_approx" and (n_keep, block) != (2, 4):
        return Support(False, f"the kernel of 'mvue_approx' takes 2:4, not {n_keep}:{block}")
    if block > kernels.MAX_BLOCK:
        return Support(False, f"blocks of {block} elements; the kernel takes at most {kernels.MAX_BLOCK}")
    return support


@custom_op("nmcompile::cpu_prune", fake=lambda x: torch.empty_like(x), tags=ANY_STRIDES)
def cpu_prune(
    x: Tensor, operator: str, n_keep: int, block: int, dim: int, key: Tensor | None = None, relu: bool = False
) -> Tensor:
    """Prune `x`; the result has the strides of `torch.empty_like(x)`.

    Args:
        x: any shape, strides and device; float64, float32, bfloat16 or float16.
        operator: a name in `OPERATORS`.
        n_keep: N.
        block: M.
        dim: the dim along which blocks run.
        key: 64 bits, 0-d int64; None if the operator draws nothing.
        relu: prune max(x, 0).

    Raises:
        OperandError: the operator does not take `x`, or the key is missing or not a key.
        ConfigError: the pattern does not fit the operator.
    """
    result = empty_like(x)
    _write(x, operator, pattern_of(n_keep, block), dim, key, relu, result)
    return result


@custom_op("nmcompile::cpu_prune_out", mutates_args=("out",))
def cpu_prune_out(
    x: Tensor,
    operator: str,
    n_keep: int,
    block: int,
    dim: int,
    out: Tensor,
    key: Tensor | None = None,
    relu: bool = False,
) -> None:
    """Run `cpu_prune` into `out`, a tensor of the shape, dtype and device of `x` and any strides.

    Raises:
        OperandError: as `cpu_prune`, or `out` has another shape, dtype or device.
    """
    check_output("out", out, x, tuple(x.shape), x.dtype)
    _write(x, operator, NMPattern(n_keep, block), dim, key, relu, out)


@custom_op(PRUNE_MASK, fake=lambda x: torch.empty_like(x, dtype=torch.bool))
def cpu_prune_mask(x: Tensor, operator: str, n_keep: int, block: int, dim: int) -> Tensor:
    """Return the mask of the elements that a ranking operator keeps, bool with the strides of `torch.empty_like(x)`.

    Args:
        x: any shape, strides and device; float64, float32, bfloat16 or float16.
        operator: `"greedy"` or `"greedy_by_value"`.
        n_keep: N.
        block: M.
        dim: the dim along which blocks run.

    Raises:
        OperandError: the operator does not take `x`.
        ConfigError: the operator draws its elements, or the pattern does not fit it.
    """
    pattern = NMPattern(n_keep, block)
    if operator not in RANKING or not runs_natively(x, operator, pattern, dim, None, relu=False):
        return OPERATORS[operator].mask(x, pattern, dim)
    mask = torch.empty_like(x, dtype=torch.bool, requires_grad=False)
    call_kernel(x, operator, pattern, dim, None, False, mask)
    return mask


def prune_natively(
    x: Tensor, operator: str, n_keep: int, block: int, axis: str, channel_dim: int, key: Tensor | None = None
) -> Tensor:
    """Prune with the native kernel; the result equals that of `nmcompile.ir.operations.prune` bit for bit."""
    view, dim, restore = grouped(x, axis, channel_dim, block)
    return like(restore(cpu_prune(view, operator, n_keep, block, dim, key)), x)


def reference(x: Tensor, operator: str, pattern: NMPattern, dim: int, key: Tensor | None, relu: bool) -> Tensor:
    """Return the reference result, which the kernels match bit for bit."""
    return OPERATORS[operator].prune(torch.relu(x.detach()) if relu else x, pattern, dim, key)


def runs_natively(x: Tensor, operator: str, pattern: NMPattern, dim: int, key: Tensor | None, relu: bool) -> bool:
    """Return whether the kernel takes the operands; not wrong ones, for which the reference raises its error."""
    keyed = operator in RANKING or (key is not None and key.dtype == torch.int64 and key.dim() == 0)
    fits = takes(x) and -x.dim() <= dim < x.dim() and not (relu and operator not in RANKING)
    return fits and keyed and prune_support(operator, pattern.n_keep, pattern.block).ok


def call_kernel(
    x: Tensor,
    operator: str,
    pattern: NMPattern,
    dim: int,
    key: Tensor | None,
    relu: bool,
    out: Tensor,
    indices: Tensor | None = None,
) -> None:
    """Run the kernel on operands for which `runs_natively` holds; a bool `out` gets the mask of the kept elements."""
    tensors = lend(x.detach().resolve_neg()), lend(out), None if indices is None else lend(indices)
    pruning = dim % x.dim(), pattern.n_keep, pattern.block
    kernels.prune(operator, *tensors, *pruning, relu, word_of(operator, key), *isa_and_threads())


def word_of(operator: str, key: Tensor | None) -> int:
    """Return a key in the form that the kernels take."""
    return 0 if key is None or operator in RANKING else int(key) & WORD


def _write(x: Tensor, operator: str, pattern: NMPattern, dim: int, key: Tensor | None, relu: bool, out: Tensor) -> None:
    if runs_natively(x, operator, pattern, dim, key, relu):
        call_kernel(x, operator, pattern, dim, key, relu, out)
    else:
        out.copy_(reference(x, operator, pattern, dim, key, relu))


def check_output(name: str, out: Tensor, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise OperandError unless `out` has the shape and dtype, on the device of `x`."""
    if (tuple(out.shape), out.dtype, out.device) != (shape, dtype, x.device):
        raise OperandError(
            f"{name} is {out.dtype} of shape {tuple(out.shape)} on {out.device}, expected {dtype} of shape {shape} on "
            f"{x.device}"
        )
