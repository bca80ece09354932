"""The three GEMMs of a layer by the native sparse kernel.

Each function writes its result into a tensor, or returns False if the pruned operand keeps more than two of some four,
or if an operand is not finite: the caller then runs the dense kernel. The sparse one skips zeros, where a dense product
yields NaN for infinity or NaN times zero.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nmcompile.backends.cpu import contraction
from nmcompile.backends.cpu.contraction import Contraction, Pair, Window
from nmcompile.backends.cpu.packed_weights import Packs
from nmcompile.backends.cpu.prune import word_of
from nmcompile.ir.operations import apply_mask
from nmcompile.native import isa_and_threads, kernels
from nmcompile.pruning.pattern import NMPattern

VECTOR = 16  # floats of the widest vectors


class Geometry(NamedTuple):
    """Geometry of a 1-d or 2-d convolution; empty for a linear layer."""

    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()
    groups: int = 1

    @property
    def is_linear(self) -> bool:
        return not self.stride

    @property
    def window(self) -> Window:
        return Window(_pair(self.stride, 1), _pair(self.padding, 0), _pair(self.dilation, 1))

    def images(self, x: Tensor) -> Tensor:
        """Return a view `(samples, channels, height, width)` of the layer's input or output."""
        if self.is_linear:
            return x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2).unsqueeze(2)
        return x if x.dim() == 4 else x.unsqueeze(2)

    def kernels(self, weight: Tensor) -> Tensor:
        """Return a view `(out, in, height, width)` of the weight."""
        return weight.view(*weight.shape, *(1,) * (4 - weight.dim())) if self.is_linear else self.images(weight)


def sparse_forward(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    output: Tensor,
    geometry: Geometry,
    packs: Packs | None = None,
) -> bool:
    """Compute Y = X Wᵀ + b for a weight that is pruned along in-channels, or that is where the mask holds.

    `packs` caches the packed weight for the next call with the same weight and mask.
    """
    window, groups, weight = geometry.window, geometry.groups, _without_overlap(weight)
    x, w, y = _readable(geometry.images(input), window), geometry.kernels(weight), geometry.images(output)
    parts = zip(x.chunk(groups, 1), w.chunk(groups), y.chunk(groups, 1), strict=True)
    masks, biases = _masks(weight, mask, groups), _chunks(None if bias is None else bias.contiguous(), groups)
    if packs is None:
        each = zip(parts, masks, biases, strict=True)
        return all(_run([contraction.forward(*part, window)], ms, bs) for part, ms, bs in each)
    contractions = [contraction.forward(*part, window) for part in parts]
    return _run_packed(contractions, masks, biases, packs)


def sparse_backward(
    grad_output: Tensor, weight: Tensor, mask: Tensor | None, grad_input: Tensor, geometry: Geometry
) -> bool:
    """Compute dX = dY W for a weight that is pruned along out-channels, or that is where the mask holds."""
    window, groups, weight = geometry.window, geometry.groups, _without_overlap(weight)
    dy, w, dx = geometry.images(grad_output), geometry.kernels(weight), geometry.images(grad_input)
    # With a stride, neighbours in a row are not written together either.
    is_row_written = window.stride == (1, 1) or dx.stride(1) == 1
    target = dx if is_row_written else torch.empty_like(dx, memory_format=torch.channels_last)
    parts = zip(dy.chunk(groups, 1), w.chunk(groups), target.chunk(groups, 1), strict=True)
    if not contraction.reaches_all(w, window):
        target.zero_()
    each = zip(parts, _masks(weight, mask, groups), strict=True)
    fits = all(_run(contraction.backward(*part, window), ms) for part, ms in each)
    if target is not dx:
        dx.copy_(target)
    return fits


def sparse_update(
    grad_output: Tensor, input: Tensor, grad_weight: Tensor, geometry: Geometry, axis: str, block: int
) -> bool:
    """Compute dW = dYᵀ X for a dY that is pruned along `axis` (see `nmcompile.ir.grouping.grouped`) in blocks."""
    window, groups = geometry.window, geometry.groups
    dy, x, dw = geometry.images(grad_output), geometry.images(input), geometry.kernels(grad_weight)
    x, samples = _readable(x, window), _samples_of_block(dy, axis, block, geometry)
    if _reads_channels_together(dy, dw, groups):
        x = x.contiguous(memory_format=torch.channels_last)
    parts = zip(dy.chunk(groups, 1), x.chunk(groups, 1), dw.chunk(groups), strict=True)
    return all(_run([contraction.update(*part, window, samples)]) for part in parts)


def sparse_pruned_update(
    grad_output: Tensor,
    input: Tensor,
    grad_weight: Tensor,
    operator: str,
    pattern: NMPattern,
    key: Tensor | None,
) -> bool:
    """Compute dW = dYᵀ X of a linear layer, pruning dY along its tokens while packing it.

    Args:
        grad_output: `(tokens, out)`, features contiguous, not pruned yet.
        input: `(tokens, in)`.
        grad_weight: `(out, in)`, written.
        operator, pattern, key: as for `nmcompile.backends.cpu.prune.cpu_prune`, which must accept them.
    """
    geometry = Geometry()
    dy, x, dw = geometry.images(grad_output), geometry.images(input), geometry.kernels(grad_weight)
    rule = operator, pattern.n_keep, pattern.block, word_of(operator, key)
    return kernels.gemm_pruned(*contraction.update(dy, x, dw, geometry.window, 1), *rule, *isa_and_threads())


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Return the masked weight, which the dense kernels read."""
    return weight if mask is None else apply_mask(weight, mask)


def _samples_of_block(grad_output: Tensor, axis: str, block: int, geometry: Geometry) -> int:
    """Return `block` if a block runs across samples, at each position; 1 if it runs along positions."""
    across = axis == "batch" or (axis == "auto" and not geometry.is_linear)
    return block if across and grad_output.shape[0] % block == 0 else 1


def _readable(input: Tensor, window: Window) -> Tensor:
    """Return the input in a layout for a window with a stride, which does not use neighbours in a row together."""
    if window.stride == (1, 1) or input.stride(1) == 1:
        return input
    return input.contiguous(memory_format=torch.channels_last)


def _reads_channels_together(grad_output: Tensor, grad_weight: Tensor, groups: int) -> bool:
    """Return whether an update is faster with an input whose channels lie side by side, though dW is then scattered.

    It reads the input once for each element of the window. Channels side by side are copied, others transposed.
    """
    out, channels, *window = grad_weight.shape
    positions = grad_output.shape[0] * grad_output.shape[2:].numel()
    return math.prod(window) > 1 and channels >= VECTOR and positions > out // groups


def _without_overlap(weight: Tensor) -> Tensor:
    """Copy an expanded weight, as no mask can have its strides."""
    return weight.contiguous() if 0 in weight.stride() else weight


def _masks(weight: Tensor, mask: Tensor | None, groups: int) -> Sequence[Tensor | None]:
    """Return the mask of each group, with the strides of the weight."""
    if mask is not None and mask.stride() != weight.stride():
        mask = torch.empty_strided(weight.shape, weight.stride(), dtype=torch.bool).copy_(mask)
    return _chunks(mask, groups)


def _chunks(x: Tensor | None, groups: int) -> Sequence[Tensor | None]:
    return [None] * groups if x is None else x.chunk(groups)


def _run(contractions: Iterable[Contraction], mask: Tensor | None = None, bias: Tensor | None = None) -> bool:
    return all(kernels.gemm(*one, mask, bias, *isa_and_threads()) for one in contractions)


def _run_packed(
    contractions: Sequence[Contraction], masks: Sequence[Tensor | None], biases: Sequence[Tensor | None], packs: Packs
) -> bool:
    if not packs:
        # Another thread may have begun to do the same.
        packs[:] = [
            kernels.pack_sparse(*one[:4], ms, *isa_and_threads()) for one, ms in zip(contractions, masks, strict=True)
        ]
    packed = [pack for pack in packs if pack is not None]
    if len(packed) < len(contractions):
        return False
    each = zip(contractions, packed, biases, strict=True)
    return all(kernels.gemm_packed(pack, *one[4:], bs, *isa_and_threads()) for one, pack, bs in each)


def _pair(values: Sequence[int], missing: int) -> Pair:
    height, width = (*(missing,) * (2 - len(values)), *values)
    return height, width
