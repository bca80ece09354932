"""One layer as it is deployed: everything that an exporter needs to write its node, and nothing about its training."""

from dataclasses import dataclass

from torch import Tensor

from nmcompile.ir.layers import Layer
from nmcompile.pruning.pattern import NMPattern
from nmcompile.quantization import Grid


@dataclass(frozen=True)
class DeployedWeight:
    """A weight whose pruning and quantization are applied to its values.

    Args:
        name: name of the parameter in the plain model.
        pattern: N:M along in-channels, or None if it is dense.
        values: in the shape of the layer's weight, zero where pruned; on the grid if there is one.
        grid: grid of the integers `values / scale`, or None for full precision.
        scale: the step, float32, 0-d or broadcastable to `values` (one for each out-channel).
    """

    name: str
    pattern: NMPattern | None
    values: Tensor
    grid: Grid | None = None
    scale: Tensor | None = None


@dataclass(frozen=True)
class DeployedActivation:
    """Steps on an activation: quantized, then pruned by value along channels, per sample.

    At the input they come before the GEMM. At the output they come after the ReLU that reads it if it is pruned or its
    grid is unsigned, else after the GEMM, its bias and its norm.
    """

    pattern: NMPattern | None = None
    grid: Grid | None = None
    scale: float | None = None


@dataclass(frozen=True)
class DeployedLayer:
    """One conv or linear layer.

    Args:
        layer: its geometry and name.
        weight, input, output: the weight and the activations as deployed.
        norm: the batch norm that the layer absorbs, and whose shift is whole steps of its accumulator; `""` if none.
        module: the module whose code makes its nodes.
    """

    layer: Layer
    weight: DeployedWeight
    input: DeployedActivation = DeployedActivation()
    output: DeployedActivation = DeployedActivation()
    norm: str = ""
    module: str = ""
