"""Transposed convolutions, whose callers may ask for an output size in each call."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from nmcompile.ir.layers import ConvTransposeLayer
from nmcompile.three_gemm.modules import ThreeGemmLayer
from nmcompile.three_gemm.triple import GemmTriple


class ThreeGemmConvTranspose(ThreeGemmLayer):
    """A transposed convolution module."""

    _output_padding: Callable[..., list[int]]  # torch's own

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        triple = self.three_gemms[""]
        if output_size is None:
            return super().forward(input)
        padding = self._output_padding_of(triple, input, output_size)
        return self._run_larger(triple, input, padding)

    def _output_padding_of(self, triple: GemmTriple, input: Tensor, output_size: Sequence[int]) -> list[int]:
        """Return the output padding that gives the asked size; raise torch's own error if none does."""
        layer = triple.layer
        assert isinstance(layer, ConvTransposeLayer)
        geometry = layer.stride, layer.padding, layer.weight_shape[2:], layer.spatial_dims, layer.dilation
        return self._output_padding(input, list(output_size), *geometry)

    def _run_larger(self, triple: GemmTriple, input: Tensor, padding: Sequence[int]) -> Tensor:
        """Run on an input with zeros behind it, and cut the output: the GEMM's own output padding is fixed."""
        layer = triple.layer
        assert isinstance(layer, ConvTransposeLayer)
        missing = [max(0, a - b) for a, b in zip(padding, layer.output_padding, strict=True)]
        zeros = [-(-less // stride) for less, stride in zip(missing, layer.stride, strict=True)]
        spatial = range(-layer.spatial_dims, 0)
        sizes = [
            (input.shape[dim] - 1) * layer.stride[dim]
            - 2 * layer.padding[dim]
            + layer.dilation[dim] * (layer.weight_shape[dim] - 1)
            + padding[dim]
            + 1
            for dim in spatial
        ]
        output = super().forward(F.pad(input, [side for more in reversed(zeros) for side in (0, more)]))
        for dim, size in zip(spatial, sizes, strict=True):
            output = output.narrow(dim, 0, size)
        return output
