"""Layers whose weight is read by code outside them, found in the bytecode of the modules around them.

A trace shows one path through a forward, or none; bytecode shows all paths, but less about each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from nmcompile.capture.attribute_chains import Chain, attribute_chains, forward_functions, reads_elements
from nmcompile.capture.regions import is_traceable
from nmcompile.capture.sites import FoundSite


@dataclass
class WeightReads:
    """Reads of layers' weights by the code around the layers.

    Args:
        certain: by layer name, the code that reads its weight, if no code can call the layer.
        possible: by layer name, the code that may read its weight; other code may call the layer.
    """

    certain: dict[str, str] = field(default_factory=dict)
    possible: dict[str, str] = field(default_factory=dict)


def find_weight_reads(model: nn.Module, layers: list[FoundSite], called: set[str]) -> WeightReads:
    """Search the code of every module that is not torch's own.

    Args:
        model: the model.
        layers: the layers that are modules.
        called: names of modules that traces show to be called.
    """
    result = WeightReads()
    names = {id(model.get_submodule(one.site.module)): one.site.layer.name for one in layers if not one.site.role}
    possibly_called = {one.site.layer.name for one in layers if one.site.module in called}
    for module in filter(is_traceable, model.modules()):
        for function in forward_functions(module):
            why = f"its weight is read by {type(module).__name__}.{function.__name__}"
            for chain in attribute_chains(function.__code__):
                layer, rest = _resolve(module, chain, names, "weight")
                if layer is not None and not rest:
                    possibly_called.add(layer)
                elif layer is not None and reads_elements("weight", rest):
                    result.certain.setdefault(layer, why)
                elif reads_elements("weight", rest):
                    inside = (names[id(m)] for m in module.modules() if id(m) in names)
                    result.possible.update((name, why) for name in inside if name not in result.possible)
    for name in possibly_called & result.certain.keys():
        result.possible[name] = result.certain.pop(name)
    return result


def find_bias_reads(model: nn.Module, layers: Mapping[int, str]) -> set[str]:
    """Return the layers whose bias the code of other modules may read, by name.

    Args:
        model: the model.
        layers: the names of the layers by the `id` of their module.
    """
    result: set[str] = set()
    for module in model.modules():
        if id(module) in layers or not is_traceable(module):
            continue
        chains = (chain for function in forward_functions(module) for chain in attribute_chains(function.__code__))
        for chain in chains:
            layer, rest = _resolve(module, chain, layers, "bias")
            if layer is not None and reads_elements("bias", rest):
                result.add(layer)
            elif reads_elements("bias", rest):
                result.update(layers[id(m)] for m in module.modules() if id(m) in layers)
    return result


def _resolve(
    module: nn.Module, chain: Chain, names: Mapping[int, str], attribute: str
) -> tuple[str | None, tuple[str, ...]]:
    """Return the layer that a chain leads to, and the names after it; None if it leads to no layer."""
    current = module
    for index, name in enumerate(chain.names if chain.of_self else ()):
        if name == attribute:
            return None, ()
        child = current._modules.get(name)
        if child is None:
            break
        if id(child) in names:
            return names[id(child)], chain.names[index + 1 :]
        current = child
    return None, chain.names
