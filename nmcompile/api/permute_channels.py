"""`CompileConfig(permute=True)`: channels in an order in which the patterns keep more, folded into the tensors."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from nmcompile.api.pipeline import plan_and_lower
from nmcompile.api.request import Request
from nmcompile.config import Phase
from nmcompile.errors import ConfigError
from nmcompile.permutation.plan import LayerChange, persistent_tensors, plan_permutations
from nmcompile.three_gemm.like import like


@torch.inference_mode(False)
@torch.no_grad()
def permute_channels(request: Request) -> Request:
    """Return the request with permuted tensors, which give the model the same outputs.

    Raises:
        ConfigError: the model has masks or sparse weights already, which are of its present order.
    """
    if request.captured.carried:
        raise ConfigError(
            "permute=True changes the order of channels, and the model has masks in the present order; compile the "
            "dense model (nmcompile.decompile) or leave permute off"
        )
    plans = plan_and_lower(request).program.plan
    rows = {plan.layer.name: plan.find(Phase.FORWARD, "weight") for plan in plans}
    patterns = {name: (row.pattern, row.is_transposable) for name, row in rows.items() if row and row.pattern}
    held = persistent_tensors(request.plain)
    found = plan_permutations(request.captured, held, patterns)
    new: dict[int, Tensor] = {}
    for name, tensor in found.tensors(request.plain).items():
        old = held[name]  # tied names hold one tensor, and will again
        if id(old) not in new:
            new[id(old)] = like(old, tensor)
    permuted = {name: new[id(old)] for name, old in held.items() if id(old) in new}
    notes = {name: _note(change) for name, change in found.report.items()}
    return replace(request, permuted=permuted, permutations=notes)


def _note(change: LayerChange) -> str:
    if change.reason:
        return f"in-channels keep their order: {change.reason}"
    return f"in-channels permuted, {change.won_back:.1%} of the pruned magnitude won back"


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor], inplace: bool) -> None:
    """Write tensors into the parameters and buffers of these names, or replace them."""
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if inplace:
            with torch.no_grad():
                getattr(module, attribute).copy_(tensor)
        elif isinstance(tensor, nn.Parameter):
            module._parameters[attribute] = tensor
        else:
            module._buffers[attribute] = tensor
