"""The exact transposable 2:4 mask by a native kernel, with the results that follow from it in the same pass.

If the kernel cannot run, the operators run `nmcompile.pruning.transposable_mask` and pack with torch. Both give the
same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nmcompile.backends.cpu.kernels import DTYPES, kernel_support
from nmcompile.custom_op import custom_op
from nmcompile.errors import OperandError
from nmcompile.native import isa_and_threads, kernels
from nmcompile.pruning.operator import check
from nmcompile.pruning.packed import pack, packed_shapes
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.transposable import transposable_mask

PATTERN = NMPattern(2, 4)
TRANSPOSABLE_MASK = "nmcompile::cpu_transposable_mask"


class Outputs(NamedTuple):
    """Outputs to write, None if not wanted. A packed form is values and indices, see `nmcompile.pruning.packed`."""

    mask: Tensor | None = None
    pruned: Tensor | None = None
    forward_values: Tensor | None = None
    forward_indices: Tensor | None = None
    backward_values: Tensor | None = None
    backward_indices: Tensor | None = None


@custom_op("nmcompile::cpu_transposable_mask", fake=lambda w: torch.empty_like(w, dtype=torch.bool))
def cpu_transposable_mask(w: Tensor, out_dim: int, in_dim: int) -> Tensor:
    """Compute `transposable_mask(w, "2:4", dims=(out_dim, in_dim))`, bit for bit.

    Args:
        w: any shape, strides and device; float64, float32, bfloat16 or float16.
        out_dim: the dim of a tile's rows.
        in_dim: the dim of a tile's columns.

    Returns:
        bool of the shape of `w`, with the strides of `torch.empty_like(w)`.
    """
    mask = torch.empty_like(w, dtype=torch.bool, requires_grad=False)
    _write(w, out_dim, in_dim, Outputs(mask=mask))
    return mask


@custom_op(
    "nmcompile::cpu_transposable_pack",
    fake=lambda w, out_dim, in_dim: (*_empty_packed(w, in_dim), *_empty_packed(w, out_dim)),
)
def cpu_transposable_pack(w: Tensor, out_dim: int, in_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prune `w` by its transposable mask, and pack it for the forward and for the backward GEMM.

    Args:
        w: any shape, strides and device; float64, float32, bfloat16 or float16.
        out_dim: the dim of a tile's rows, a multiple of four.
        in_dim: the dim of a tile's columns, a multiple of four.

    Returns:
        Values and indices packed along `in_dim`, then values and indices packed along `out_dim`; all contiguous.
    """
    forward, backward = _empty_packed(w, in_dim), _empty_packed(w, out_dim)
    _write(w, out_dim, in_dim, Outputs(None, None, *forward, *backward))
    return *forward, *backward


@custom_op("nmcompile::cpu_transposable_out", mutates_args=Outputs._fields)
def cpu_transposable_out(
    w: Tensor,
    out_dim: int,
    in_dim: int,
    mask: Tensor | None = None,
    pruned: Tensor | None = None,
    forward_values: Tensor | None = None,
    forward_indices: Tensor | None = None,
    backward_values: Tensor | None = None,
    backward_indices: Tensor | None = None,
) -> None:
    """Write the mask (bool), the pruned weight and the packed forms into given tensors, of any strides, in one pass.

    Raises:
        OperandError: an output has another shape, dtype or device than the operator's own result.
    """
    outputs = Outputs(mask, pruned, forward_values, forward_indices, backward_values, backward_indices)
    _write(w, out_dim, in_dim, outputs)


def _empty_packed(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    values, indices = packed_shapes(tuple(w.shape), check(w, dim))
    return w.new_empty(values), w.new_empty(indices, dtype=torch.uint8)


def _write(w: Tensor, out_dim: int, in_dim: int, outputs: Outputs) -> None:
    rows, columns = check(w, out_dim), check(w, in_dim)
    _check_outputs(w, rows, columns, outputs)
    (_write_by_kernel if _kernel_takes(w, rows, columns, outputs) else _write_by_reference)(w, rows, columns, outputs)


def _write_by_kernel(w: Tensor, rows: int, columns: int, outputs: Outputs) -> None:
    kernels.transposable(w.detach().resolve_neg(), rows, columns, *outputs, *isa_and_threads())


def _write_by_reference(w: Tensor, rows: int, columns: int, outputs: Outputs) -> None:
    mask = transposable_mask(w, PATTERN, dims=(rows, columns))
    if outputs.mask is not None:
        outputs.mask.copy_(mask)
    if outputs.pruned is not None:
        outputs.pruned.copy_(torch.where(mask, w.detach(), 0.0))
    forward, backward = outputs[2:4], outputs[4:6]
    for dim, wanted in ((columns, forward), (rows, backward)):
        if wanted[0] is not None:
            for out, result in zip(wanted, pack(w, mask, dim), strict=True):
                assert out is not None
                out.copy_(result)


def _kernel_takes(w: Tensor, rows: int, columns: int, outputs: Outputs) -> bool:
    """Return whether the kernel takes the operands; not wrong ones, for which the reference raises its error."""
    on_cpu = w.device.type == "cpu" and w.dtype in DTYPES and w.layout == torch.strided
    plain = not any(out is not None and out.is_neg() for out in outputs)
    return on_cpu and plain and rows != columns and kernel_support().ok and w.dim() - 2 <= kernels.MAX_BATCH_DIMS


def _check_outputs(w: Tensor, rows: int, columns: int, outputs: Outputs) -> None:
    shape = tuple(w.shape)
    expected = {"mask": (shape, torch.bool), "pruned": (shape, w.dtype)}
    for name, dim in (("forward", columns), ("backward", rows)):
        values, indices = getattr(outputs, f"{name}_values"), getattr(outputs, f"{name}_indices")
        if (values is None) != (indices is None):
            raise OperandError(f"{name}_values and {name}_indices are one packed form; give both")
        if values is not None:
            of_values, of_indices = packed_shapes(shape, dim)
            expected[f"{name}_values"] = of_values, w.dtype
            expected[f"{name}_indices"] = of_indices, torch.uint8
    for name, out in outputs._asdict().items():
        if out is not None and (tuple(out.shape), out.dtype, out.device) != (*expected[name], w.device):
            size, dtype = expected[name]
            raise OperandError(
                f"{name} is {out.dtype} of shape {tuple(out.shape)} on {out.device}, expected {dtype} of shape {size} "
                f"on {w.device}"
            )
