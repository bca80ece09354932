"""Graph passes, one file each; `compile_passes` is the order in which `nmcompile.compile` runs them."""

from collections.abc import Sequence

from nmcompile.ir.protocols import Backend, Pass
from nmcompile.passes.expand_gemms import ExpandGemms as ExpandGemms
from nmcompile.passes.lower_nodes import LowerNodes as LowerNodes
from nmcompile.passes.prune_gradients import PruneGradients as PruneGradients
from nmcompile.passes.prune_inputs import PruneInputs as PruneInputs
from nmcompile.passes.prune_weights import PruneWeights as PruneWeights
from nmcompile.passes.quantize_biases import QuantizeBiases as QuantizeBiases
from nmcompile.passes.quantize_inputs import QuantizeInputs as QuantizeInputs
from nmcompile.passes.quantize_outputs import QuantizeOutputs as QuantizeOutputs
from nmcompile.passes.quantize_weights import QuantizeWeights as QuantizeWeights


def compile_passes(backends: Sequence[Backend]) -> tuple[Pass, ...]:
    """Return the passes from planned layers to lowered three-GEMM graphs, in order."""
    return (
        ExpandGemms(),
        PruneWeights(),
        PruneInputs(),
        PruneGradients(),
        QuantizeWeights(),
        QuantizeInputs(),
        QuantizeBiases(),
        QuantizeOutputs(),
        LowerNodes(tuple(backends)),
    )
