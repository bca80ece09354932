"""Merging of adapters into pruned layers, which is refused: the sum would get a mask of its own.

A pruned base layer computes with W·m, and its adapter adds BA. PEFT merges BA into W, of which the layer then computes
(W + BA)·m' with another mask m'.
"""

from functools import partial
from typing import NoReturn

from torch import nn

from nmcompile.errors import ConfigError

BASE = "base_layer"


def refuse_merging(model: nn.Module) -> None:
    """Make the adapter layers of PEFT refuse to merge into base layers whose weight is masked or quantized."""
    for name, module in model.named_modules():
        base = getattr(module, BASE, None)
        if getattr(module, "adapter_layer_names", ()) and isinstance(base, nn.Module) and _changes_weights(base):
            module.__dict__["merge"] = partial(_refuse, name)


def allow_merging(module: nn.Module) -> None:
    """Let an adapter layer merge again."""
    if getattr(module.__dict__.get("merge"), "func", None) is _refuse:
        del module.__dict__["merge"]


def _changes_weights(base: nn.Module) -> bool:
    triples = (one for module in base.modules() for one in module.__dict__.get("three_gemms", {}).values())
    return any(one.mask is not None or one.steps.weight_grid is not None for one in triples)


def _refuse(name: str, *args: object, **kwargs: object) -> NoReturn:
    raise ConfigError(
        f"layer {name!r}: its adapter cannot be merged into a pruned base layer, as the sum would be pruned anew; "
        "to keep what the model computes, call nmcompile.finalize(model).merge_and_unload(); to prune the sum, "
        "nmcompile.decompile(model).merge_and_unload() and compile the result"
    )
