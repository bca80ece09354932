"""Lookup of the three-GEMM layers of a compiled model."""

from collections.abc import Iterator

from torch import nn

from nmcompile.three_gemm.modules import ThreeGemm
from nmcompile.three_gemm.triple import GemmTriple


def triples_of(model: nn.Module) -> Iterator[GemmTriple]:
    """Yield every three-GEMM layer of a compiled model."""
    for module in model.modules():
        if isinstance(module, ThreeGemm):
            yield from module.three_gemms.values()
