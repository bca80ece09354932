"""The pruning operators straight into the 2:4 format of `nmcompile.pruning.packed`, in one pass over the tensor.

The patterns are 1:2 and 2:4; both fit the format. The pruned tensor is packed under its `two_of_four` mask.
"""

import torch
from torch import Tensor

from nmcompile.backends.cpu.prune import call_kernel, check_output, reference, runs_natively
from nmcompile.custom_op import custom_op
from nmcompile.errors import ConfigError
from nmcompile.pruning.operator import check
from nmcompile.pruning.packed import GROUP, KEPT, pack, packed_shapes, two_of_four
from nmcompile.pruning.pattern import NMPattern


def _empty(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    values, indices = packed_shapes(tuple(x.shape), check(x, dim))
    return x.new_empty(values), x.new_empty(indices, dtype=torch.uint8)


@custom_op("nmcompile::cpu_prune_packed", fake=_empty)
def cpu_prune_packed(
    x: Tensor, operator: str, n_keep: int, block: int, dim: int, key: Tensor | None = None, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """Run `cpu_prune(x, ...)` and pack the result along `dim`.

    Args:
        x: as for `cpu_prune`; the size of `dim` is a multiple of four.
        operator, n_keep, block, dim, key, relu: as for `cpu_prune`; N:M is 1:2 or 2:4.

    Returns:
        Values, of the dtype of `x`, and indices, uint8; both contiguous.

    Raises:
        OperandError: as `cpu_prune`, or the size of `dim` is not a multiple of four.
        ConfigError: the pattern does not fit the operator or the format.
    """
    values, indices = _empty(x, dim)
    _write(x, operator, _fitting(n_keep, block), dim, key, relu, values, indices)
    return values, indices


@custom_op("nmcompile::cpu_prune_packed_out", mutates_args=("values", "indices"))
def cpu_prune_packed_out(
    x: Tensor,
    operator: str,
    n_keep: int,
    block: int,
    dim: int,
    values: Tensor,
    indices: Tensor,
    key: Tensor | None = None,
    relu: bool = False,
) -> None:
    """Run `cpu_prune_packed` into `values` and `indices`, of its shapes and dtypes and any strides.

    Raises:
        OperandError: as `cpu_prune_packed`, or an output has another shape, dtype or device.
        ConfigError: the pattern does not fit the operator or the format.
    """
    of_values, of_indices = packed_shapes(tuple(x.shape), check(x, dim))
    check_output("values", values, x, of_values, x.dtype)
    check_output("indices", indices, x, of_indices, torch.uint8)
    _write(x, operator, _fitting(n_keep, block), dim, key, relu, values, indices)


def _fitting(n_keep: int, block: int) -> NMPattern:
    pattern = NMPattern(n_keep, block)
    if GROUP % block or n_keep * GROUP != KEPT * block:
        raise ConfigError(f"pattern {pattern} does not fit the packed format; prune to 2:4 or 1:2")
    return pattern


def _write(
    x: Tensor,
    operator: str,
    pattern: NMPattern,
    dim: int,
    key: Tensor | None,
    relu: bool,
    values: Tensor,
    indices: Tensor,
) -> None:
    if runs_natively(x, operator, pattern, dim, key, relu):
        call_kernel(x, operator, pattern, dim, key, relu, values, indices)
        return
    pruned = reference(x, operator, pattern, dim, key, relu)
    packed = pack(pruned, two_of_four(pruned, dim), dim)
    values.copy_(packed.values)
    indices.copy_(packed.indices)
