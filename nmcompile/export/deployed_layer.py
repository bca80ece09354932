"""One layer as it is deployed: what an exporter needs to write its node, and nothing of how it was trained."""

from dataclasses import dataclass

from torch import Tensor

from nmcompile.ir.layers import Layer
from nmcompile.pruning.pattern import NMPattern
from nmcompile.quantization import Grid


@dataclass(frozen=True)
class DeployedWeight:
    """A weight with its pruning and quantization made real.

    Args:
        name: of the parameter in the plain model.
        pattern: N:M along in-channels, or None where it is dense.
        values: of the layer's weight shape, zero where pruned; on the grid where there is one.
        grid: of the integers `values / scale`, or None for full precision.
        scale: the step, float32, 0-d or broadcastable to `values` (one for each out-channel).
    """

    name: str
    pattern: NMPattern | None
    values: Tensor
    grid: Grid | None = None
    scale: Tensor | None = None


@dataclass(frozen=True)
class DeployedActivation:
    """What happens to an activation: pruned by value along channels, per sample, then quantized.

    At the input it happens in front of the GEMM; at the output behind the ReLU that reads it where it is pruned or its
    grid unsigned, else behind the GEMM, its bias and its norm.
    """

    pattern: NMPattern | None = None
    grid: Grid | None = None
    scale: float | None = None


@dataclass(frozen=True)
class DeployedLayer:
    """One conv or linear layer.

    Args:
        layer: its geometry and name.
        weight, input, output: what became of them.
        norm: the batch norm that the layer absorbs, and whose shift is whole steps of its accumulator; `""` if none.
    """

    layer: Layer
    weight: DeployedWeight
    input: DeployedActivation = DeployedActivation()
    output: DeployedActivation = DeployedActivation()
    norm: str = ""
