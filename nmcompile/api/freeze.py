"""The user's promise that the weights of a compiled model do not change."""

from torch import nn

from nmcompile.checks import check_compiled
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.frozen import Frozen
from nmcompile.three_gemm.record import record_of
from nmcompile.training.find_masks import masks_among
from nmcompile.weight_cache import forget


def freeze(model: nn.Module) -> None:
    """Promise that no weight changes from now on, so calls need not compare any.

    Without it, each call that does not train a weight reads it once, to see any write since its mask and its packed
    form were computed. On a GPU that has to wait for the result, so packed weights are cached there only after
    `freeze`. The same holds everywhere for the masked weights of dense kernels, whose cache takes as much memory as the
    weights. Call it once before serving. In mode `"inference"` a linear layer or a convolution on a CPU then puts its
    input on the grid and multiplies integers in one native call, if that is measured to be faster. Sums of integers are
    exact, so results may differ from those before in the last digit. Weights that a forward computes, or that FSDP2
    gathers, are compared anyway.

    These end the promise for the whole model: a call with gradients for a weight of the model, an optimizer step on one
    of its parameters, `load_state_dict`, `load_sparse_state_dict`, `.to()` and compiling again. A copy of the model
    does not inherit it. A write by other means while it holds is not seen.

    Args:
        model: a model that `compile` made, also inside DDP or `torch.compile`.

    Raises:
        StateError: the model is not compiled.
    """
    check_compiled("model", model)
    triples = list(triples_of(model))
    if not triples:
        record_of(model)
    for mask in masks_among(triples).values():
        mask.look()
    parameters = list(model.parameters())
    forget(parameters)
    frozen = Frozen(parameters)
    for triple in triples:
        triple.frozen = frozen
