"""Learned clips of quantized activations (PACT)."""

from torch import nn

from nmcompile.checks import check_compiled
from nmcompile.three_gemm.find_triples import triples_of


def clips(compiled: nn.Module) -> list[nn.Parameter]:
    """Return the clips that `CompileConfig(clip="pact")` learns, 0-d float32, to give to the optimizer.

    They are not parameters of the model, so `state_dict()` keeps the dense keys; `sparse_state_dict` saves them. A
    group of their own with weight decay is PACT's regularization:
    `SGD([{"params": model.parameters()}, {"params": clips(model), "weight_decay": 1e-3}], ...)`.
    """
    check_compiled("compiled", compiled)
    steps = (step for triple in triples_of(compiled) for step in triple.steps.activations)
    return [step.clip for step in steps if step.clip.requires_grad]
