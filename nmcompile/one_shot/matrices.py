"""The GEMM of a layer: its weight as matrices, its input as rows, and back.

Every group of a layer computes Y = X Wᵀ with W `(out, columns)` and X `(tokens, columns)`. The columns of a convolution
run over kernel positions, and over the in-channels at each position: N:M blocks are then runs of M columns.
"""

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from nmcompile.ir.layers import ConvLayer, Layer

SLAB = 1 << 24  # elements of the rows at a time: 64 MB of float32


def as_matrices(layer: Layer, weight: Tensor) -> Tensor:
    """Return the weight as `(groups, out / groups, columns)`; it may share memory."""
    return weight.movedim((layer.out_dim, layer.in_dim), (0, -1)).reshape(layer.groups, -1, columns_of(layer))


def from_matrices(layer: Layer, matrices: Tensor) -> Tensor:
    """Invert `as_matrices`: return a tensor of the weight's shape."""
    kernel = layer.weight_shape[2:]
    stacked = matrices.reshape(layer.out_features, *kernel, layer.in_features)
    return stacked.movedim((0, -1), (layer.out_dim, layer.in_dim))


def columns_of(layer: Layer) -> int:
    """Return the length of the contraction of one group: kernel positions times in-channels."""
    return layer.parameters // layer.out_features


def input_rows(layer: Layer, x: Tensor) -> Tensor:
    """Return all rows that the layer multiplies with its matrices, `(groups, tokens, columns)`.

    Args:
        layer: the layer.
        x: an input of the layer, batched or not.
    """
    return torch.cat(list(input_slabs(layer, x)), dim=1)


def input_slabs(layer: Layer, x: Tensor) -> Iterator[Tensor]:
    """Yield `input_rows` in slabs of about `SLAB` elements, so that the patches of large images never stand at once."""
    prepared, _ = layer.prepare(x)
    if isinstance(layer, ConvLayer):
        yield from _patch_slabs(layer, prepared)
    else:
        rows = prepared.reshape(1, -1, layer.in_features)
        yield from rows.split(max(1, SLAB // layer.in_features), dim=1)


def _patch_slabs(layer: ConvLayer, x: Tensor) -> Iterator[Tensor]:
    """Yield slabs of a few samples, or of a few lines of one sample where a sample is large."""
    patches = _patches(layer, x)
    samples, lines = patches.shape[:2]
    line = max(1, patches[:1, :1].numel())
    many_lines = max(1, min(lines, SLAB // line))
    many_samples = max(1, SLAB // (line * many_lines))
    for sample, start in product(range(0, samples, many_samples), range(0, lines, many_lines)):
        slab = patches[sample : sample + many_samples, start : start + many_lines]
        # (samples, *out, groups, *kernel, channels)
        yield slab.movedim(1 + layer.spatial_dims, 0).reshape(layer.groups, -1, columns_of(layer))


def _patches(layer: ConvLayer, x: Tensor) -> Tensor:
    """Return the inputs of all kernel positions as a view, `(samples, *out, groups, *kernel, channels)`."""
    padded = F.pad(x, [side for padding in reversed(layer.padding) for side in (padding, padding)])
    patches = padded.movedim(1, -1).contiguous()  # runs of channels are copied fast
    for dim, width in enumerate(layer.weight_shape[2:]):
        reach = layer.dilation[dim] * (width - 1) + 1
        patches = patches.unfold(1 + dim, reach, layer.stride[dim])[..., :: layer.dilation[dim]]
    # (samples, *out, channels, *kernel)
    channels = 1 + layer.spatial_dims
    grouped: Tensor = patches.unflatten(channels, (layer.groups, -1))
    return grouped.movedim(channels + 1, -1)
