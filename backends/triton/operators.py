"""The kernels as torch operators. If a kernel cannot run, its operator runs the reference.

Kernels are imported when the first of them runs: importing Triton takes a second, and may fail.
"""

from itertools import product

import torch
from torch import Tensor

from nmcompile.backends.triton.support import operator_support, tensor_runs
from nmcompile.custom_op import ANY_STRIDES, custom_op
from nmcompile.pruning.operator import check
from nmcompile.pruning.packed import pack, two_of_four
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.references import OPERATORS
from nmcompile.pruning.transposable import transposable_mask

MASK_KERNEL = "nmcompile::triton_transposable_mask"


def _empty_lines(x: Tensor, dim: int) -> Tensor:
    return x.new_empty(x.shape[1 - dim % 2], x.shape[dim])


def _empty_packed(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    lines, length = x.shape[1 - dim % 2], x.shape[dim]
    return x.new_empty(lines, length // 2), x.new_empty(lines, length // 8, dtype=torch.uint8)


def _empty_tiles(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = w.shape
    return w.new_empty(rows, columns), w.new_empty(columns, rows), w.new_empty(rows, columns, dtype=torch.bool)


@custom_op("nmcompile::triton_prune", fake=lambda x: torch.empty_like(x), tags=ANY_STRIDES)
def triton_prune(x: Tensor, operator: str, n_keep: int, block: int, dim: int, key: Tensor | None = None) -> Tensor:
    """Compute `OPERATORS[operator].prune(x, n_keep:block, dim, key)`, bit for bit.

    Args:
        x: any shape, strides and device; float64, float32, bfloat16 or float16.
        operator: a name in `OPERATORS`.
        n_keep: N.
        block: M.
        dim: the dim along which blocks run.
        key: 64 bits, 0-d int64; `None` for the operators that draw nothing.
    """
    return _prune_into(torch.empty_like(x, requires_grad=False), x, operator, NMPattern(n_keep, block), dim, key)


@custom_op("nmcompile::triton_prune_out", mutates_args=("out",))
def triton_prune_out(
    x: Tensor, operator: str, n_keep: int, block: int, dim: int, out: Tensor, key: Tensor | None = None
) -> None:
    """Run `triton_prune` into `out`, a tensor of the shape, dtype and device of `x` and any strides."""
    _prune_into(out, x, operator, NMPattern(n_keep, block), dim, key)


@custom_op("nmcompile::triton_prune_lines", fake=_empty_lines)
def triton_prune_lines(
    x: Tensor, operator: str, n_keep: int, block: int, dim: int, key: Tensor | None = None
) -> Tensor:
    """Prune a matrix along `dim` and return its lines along `dim` as contiguous rows: transposed for `dim` 0.

    The arguments are those of `triton_prune`, with `x` of shape `(r, c)`; the result is `(c, r)` for `dim` 0 and
    `(r, c)` for 1.
    """
    pattern = NMPattern(n_keep, block)
    whole = block in (2, 4, 8) and x.shape[dim] % block == 0
    if not (whole and _kernel_takes(x, operator, pattern, key)):
        return _as_lines(OPERATORS[operator].prune(x, pattern, dim, key), dim)
    from nmcompile.backends.triton.kernels.lines import prune_lines

    return prune_lines(_plain(x), operator, pattern, check(x, dim), key, _empty_lines(x, dim))


@custom_op("nmcompile::triton_pack_lines", fake=_empty_packed)
def triton_pack_lines(x: Tensor, operator: str, dim: int, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prune a matrix 2:4 along `dim` and pack it as `nmcompile.pruning.packed`, its lines along `dim` as rows.

    The arguments are those of `triton_prune_lines`; the size along `dim`, below length, is a multiple of 8.

    Returns:
        values `(lines, length / 2)` and indices `(lines, length / 8)`.
    """
    pattern = NMPattern(2, 4)
    if not _kernel_takes(x, operator, pattern, key):
        lines = _as_lines(OPERATORS[operator].prune(x, pattern, dim, key), dim)
        return pack(lines, two_of_four(lines, 1), 1)
    from nmcompile.backends.triton.kernels.lines import pack_lines

    return pack_lines(_plain(x), operator, check(x, dim), key, *_empty_packed(x, dim))


@custom_op("nmcompile::triton_prune_tiles", fake=_empty_tiles)
def triton_prune_tiles(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prune a matrix by its exact transposable 2:4 mask.

    Args:
        w: `(r, c)`, any strides and device; float64, float32, bfloat16 or float16.

    Returns:
        The pruned matrix `(r, c)`, the same transposed `(c, r)`, and the mask `(r, c)` bool, all contiguous.
    """
    if not tensor_runs(w):
        mask = transposable_mask(w.contiguous(), "2:4")
        pruned = torch.where(mask, w.detach(), 0.0).contiguous()
        return pruned, pruned.t().clone(memory_format=torch.contiguous_format), mask
    from nmcompile.backends.triton.kernels.tiles import prune_tiles

    pruned, transposed, mask = _empty_tiles(w)
    prune_tiles(_plain(w), out=pruned, transposed=transposed, mask=mask)
    return pruned, transposed, mask


@custom_op(MASK_KERNEL, fake=lambda w: torch.empty_like(w, dtype=torch.bool))
def triton_transposable_mask(w: Tensor, out_dim: int, in_dim: int) -> Tensor:
    """Compute `transposable_mask(w, "2:4", dims=(out_dim, in_dim))`, bit for bit.

    Returns:
        bool of the shape of `w`, with the strides of `torch.empty_like(w)`.
    """
    mask = torch.empty_like(w, dtype=torch.bool, requires_grad=False)
    if not tensor_runs(w):
        return mask.copy_(transposable_mask(w, "2:4", dims=(out_dim, in_dim)))
    from nmcompile.backends.triton.kernels.tiles import prune_tiles

    # The kernel takes matrices: one for each kernel position of a convolution.
    matrices, masks = (x.movedim((out_dim, in_dim), (-2, -1)) for x in (_plain(w), mask))
    for position in product(*map(range, matrices.shape[:-2])):
        matrix = torch.empty(matrices.shape[-2:], dtype=torch.bool, device=w.device)
        prune_tiles(matrices[position], mask=matrix)
        masks[position].copy_(matrix)
    return mask


def _prune_into(out: Tensor, x: Tensor, operator: str, pattern: NMPattern, dim: int, key: Tensor | None) -> Tensor:
    if not _kernel_takes(x, operator, pattern, key) or out.is_neg():
        return out.copy_(OPERATORS[operator].prune(x, pattern, dim, key))
    from nmcompile.backends.triton.kernels.blocks import prune_blocks

    return prune_blocks(_plain(x), operator, pattern, check(x, dim), key, out)


def _kernel_takes(x: Tensor, operator: str, pattern: NMPattern, key: Tensor | None) -> bool:
    """Return whether the kernel takes the arguments; not wrong keys, for which the reference raises its error."""
    keyed = key is not None and key.dtype == torch.int64 and key.dim() == 0
    drawn = keyed or not OPERATORS[operator].needs_key
    return drawn and tensor_runs(x) and operator_support(operator, pattern).ok


def _plain(x: Tensor) -> Tensor:
    return x.detach().resolve_neg()


def _as_lines(pruned: Tensor, dim: int) -> Tensor:
    """Return the lines as a new tensor even if they are contiguous: an operator may not return a view of its input."""
    return pruned.movedim(dim, -1).contiguous()
