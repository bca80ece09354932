"""The share of a model's multiplications that pruned GEMMs do: a speed-up of 1.00 with nothing pruned says nothing."""

from torch import nn

import nmcompile
from nmcompile import Phase


def pruned_share(model: nn.Module) -> float:
    """Return the share over all three phases of a compiled model that ran."""
    layers = [layer for layer in nmcompile.inspect(model).layers if layer.macs is not None]
    total = sum((layer.macs or 0) * len(Phase) for layer in layers)
    pruned = sum(layer.macs or 0 for layer in layers for phase in Phase if layer.density(phase) < 1)
    return pruned / max(1, total)
