"""Bytes of the parameters: dense, and with pruned weights stored as kept values and their positions."""

from nmcompile.config import Phase
from nmcompile.report.layers import BITS, LayerReport

BYTE = 8


def stored_bits(layer: LayerReport) -> float:
    """Return the bits of an element of a layer's weight, on average.

    N of M values are stored, each with its position among the M; a quantized value takes the bits of its grid.
    """
    if layer.status != "sparse":
        return BITS
    row, quantized = layer.plan.find(Phase.FORWARD, "weight"), layer.plan.grid_row("weight")
    bits = BITS if quantized is None or quantized.grid is None else quantized.grid.bits
    if row is None or row.pattern is None:
        return bits
    return row.pattern.density * (bits + (row.pattern.block - 1).bit_length())


def weight_bytes(layers: tuple[LayerReport, ...], weights: dict[str, str], parameters: int) -> dict[str, int]:
    """Return the bytes of all parameters in fp32, and those left if pruned and quantized weights are stored so.

    Args:
        layers: the layers of the report.
        weights: the name of each layer's weight; a weight that several layers read counts once.
        parameters: the number of elements of all parameters.
    """
    smallest = {weights[layer.name]: (layer.layer.parameters, stored_bits(layer)) for layer in layers}
    saved = sum(count * (BITS - bits) for count, bits in smallest.values())
    dense = parameters * BITS
    return {"dense": dense // BYTE, "stored": int(dense - saved) // BYTE}
