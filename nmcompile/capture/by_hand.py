"""Methods whose code may multiply by the weights of layers, found in their bytecode.

Only `forward` is traced, and only its code runs with the example. Users call other methods beside it: CLIP's
`encode_image`, a Lightning module's `training_step`.
"""

import dis
import functools
import inspect
import types
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from nmcompile.capture.attribute_chains import (
    Chain,
    attribute_chains,
    is_model_code,
    reachable_functions,
    reads_elements,
)
from nmcompile.capture.regions import GEMM_NAMES, is_traceable
from nmcompile.ir.captured import Site
from nmcompile.three_gemm.instance_forward import forward_slot

MULTIPLY = GEMM_NAMES | {"matmul", "mm", "bmm", "baddbmm", "mv", "dot", "einsum", "tensordot", "inner", "grouped_mm"}
INFRASTRUCTURE = (
    "torch.", "transformers.modeling_utils.", "transformers.generation.", "transformers.integrations.",
    "lightning.pytorch.core.", "lightning.fabric.", "pytorch_lightning.core.",
)  # fmt: skip
"""Modules whose classes save, load, train and generate: none multiplies by a weight in a model's stead."""
ByHand = dict[str, dict[str, str]]
"""The weights that each method may multiply by, with their layers; weights are named as in the module."""


def find_by_hand(model: nn.Module, sites: Sequence[Site], shown: Collection[str]) -> dict[str, ByHand]:
    """Return by module the methods that may multiply by the weights of layers.

    Args:
        model: the model.
        sites: the layers.
        shown: the modules whose forward runs from a graph, or as an example showed.
    """
    layers = {site.weight: site.layer.name for site in reversed(sites) if not site.is_expression}
    modules = {name: module for name, module in model.named_modules() if is_traceable(module)}
    chains = {cls: dict(_multiplying(cls)) for cls in set(map(type, modules.values()))}
    found = dict[str, ByHand]()
    for name, module in modules.items():
        inside = {
            w.removeprefix(f"{name}."): layer for w, layer in layers.items() if not name or w.startswith(f"{name}.")
        }
        read = {one: _read(module, chains[type(module)][one], inside) for one in chains[type(module)] if inside}
        if name in shown or forward_slot(module) is None:
            read.pop("forward", None)
        found[name] = {method: weights for method, weights in read.items() if weights}
    return {name: methods for name, methods in found.items() if methods}


def _multiplying(cls: type[nn.Module]) -> Iterator[tuple[str, tuple[Chain, ...]]]:
    """Yield the public methods of a class that multiply, with the attributes that their code reads."""
    owners = [one for one in cls.__mro__ if is_model_code(one) and not f"{one.__module__}.".startswith(INFRASTRUCTURE)]
    methods = dict.fromkeys(name for one in owners for name, value in vars(one).items() if inspect.isfunction(value))
    for name in methods:
        if not name.startswith("_"):
            aside = () if name == "forward" else ("forward",)  # its code runs apart
            codes = [function.__code__ for function in reachable_functions(cls, getattr(cls, name), aside)]
            if any(map(_multiplies, codes)):
                yield name, tuple(chain for code in codes for chain in attribute_chains(code))


@functools.lru_cache(maxsize=4096)
def _multiplies(code: types.CodeType) -> bool:
    """Return whether a function or one of its inner functions names a product, or has an `@`."""
    operators = (one.argrepr or one.opname for one in dis.get_instructions(code) if one.opname.startswith("BINARY"))
    inner = (one for one in code.co_consts if isinstance(one, types.CodeType))
    is_named = not MULTIPLY.isdisjoint(code.co_names)
    return is_named or not {"@", "BINARY_MATRIX_MULTIPLY"}.isdisjoint(operators) or any(map(_multiplies, inner))


def _read(module: nn.Module, chains: tuple[Chain, ...], inside: Mapping[str, str]) -> dict[str, str]:
    """Return the weights in a module that one of the chains may read: the one that it names, else all of its name."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    read = set[str]()
    for chain in chains:
        paths = {".".join(chain.names[: end + 1]) for end in range(len(chain.names))} if chain.of_self else set()
        named = paths & parameters
        possible = [one for one in inside if one in named or not named]
        asks = "get_parameter" in chain.names
        read.update(one for one in possible if asks or reads_elements(one.rpartition(".")[2], chain.names))
    return {weight: layer for weight, layer in inside.items() if weight in read}
