"""Adapters: small layers that PEFT and similar libraries add to a trained model and train in its place.

They are found by structure, so none of these libraries needs to be installed:

- under a PEFT tuner layer (a module with `adapter_layer_names` and a child `base_layer`), all but the base layer;
- the `prompt_encoder` of a model with a `peft_config`;
- everything named `lora_...`, the names that loralib, torchtune and LitGPT use.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from nmcompile.capture.names import join
from nmcompile.capture.sites import FoundSite

BASE = "base_layer"


def find_adapters(model: nn.Module, found: Sequence[FoundSite]) -> frozenset[str]:
    """Return the layers whose weights are computed from parameters of adapters alone."""
    adapters = {id(parameter) for parameter in _adapter_parameters(model)}
    return frozenset(one.site.layer.name for one in found if one.parameters and one.parameters <= adapters)


def read_by_adapters(model: nn.Module) -> dict[str, str]:
    """Return, with the reason, the base layers whose unmasked weight an adapter reads in addition to calling them."""
    names = ((name, module) for name, module in model.named_modules() if _is_tuner(module))
    reason = "its weight is read by DoRA, which scales by its norm"
    return {join(name, BASE): reason for name, module in names if len(getattr(module, "lora_magnitude_vector", ()))}


def _adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(part.lower().startswith("lora_") for part in name.split(".")):
            yield parameter
    for module in model.modules():
        for name, child in module.named_children():
            if (_is_tuner(module) and name != BASE) or (name == "prompt_encoder" and hasattr(module, "peft_config")):
                yield from child.parameters()
        if _is_tuner(module):
            yield from module.parameters(recurse=False)


def _is_tuner(module: nn.Module) -> bool:
    return bool(getattr(module, "adapter_layer_names", ())) and isinstance(getattr(module, BASE, None), nn.Module)
