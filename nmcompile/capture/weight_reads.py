"""Layers whose weight is read by code outside them, found in the bytecode of the modules around them.

A trace shows one path through a forward, or none; bytecode shows all paths, but less about each.
"""

import dis
import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from nmcompile.capture.regions import METADATA, is_traceable, names_in
from nmcompile.capture.sites import FoundSite
from nmcompile.three_gemm.fast_paths import FAST_PATHS


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
        for function in reachable_functions(module):
            why = f"its weight is read by {type(module).__name__}.{function.__name__}"
            for chain in attribute_chains(function.__code__):
                layer, rest = _resolve(module, chain, names, "weight")
                if layer is not None and not rest:
                    possibly_called.add(layer)
                elif layer is not None and _reads("weight", rest):
                    result.certain.setdefault(layer, why)
                elif _reads("weight", rest):
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
        chains = (chain for function in reachable_functions(module) for chain in attribute_chains(function.__code__))
        for chain in chains:
            layer, rest = _resolve(module, chain, layers, "bias")
            if layer is not None and _reads("bias", rest):
                result.add(layer)
            elif _reads("bias", rest):
                result.update(layers[id(m)] for m in module.modules() if id(m) in layers)
    return result


@dataclass(frozen=True)
class Chain:
    """Names as in `a.b.c`: the attributes of `self`, or of another value."""

    of_self: bool
    names: tuple[str, ...]


def attribute_chains(code: types.CodeType) -> Iterator[Chain]:
    """Yield every chain of attributes that a function and its inner functions read."""
    yield from _chains(code, "self" if code.co_varnames[:1] == ("self",) else "")


def _chains(code: types.CodeType, owner: str) -> Iterator[Chain]:
    names: list[str] = []
    of_self = loads_self = False
    for instruction in dis.get_instructions(code):
        if instruction.opname == "EXTENDED_ARG":
            continue
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            of_self = of_self if names else loads_self
            names.append(str(instruction.argval))
            continue
        if names:
            yield Chain(of_self, tuple(names))
            names = []
        loaded = instruction.argval[-1:] if isinstance(instruction.argval, tuple) else (instruction.argval,)
        loads_self = instruction.opname.startswith("LOAD_") and bool(owner) and loaded == (owner,)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _chains(constant, owner)


def reachable_functions(module: nn.Module) -> list[types.FunctionType]:
    """Return the functions that a call of the module may run, judged by name: its methods, and plain functions."""
    found: dict[types.CodeType, types.FunctionType] = {}
    waiting = [module.__dict__.get("forward", type(module).forward)]
    while waiting:
        function = _plain_function(waiting.pop())
        if function is None or function.__code__ in found:
            continue
        found[function.__code__] = function
        waiting += [cell.cell_contents for cell in function.__closure__ or () if _has_contents(cell)]
        for name in names_in(function.__code__):
            waiting += [vars(cls)[name] for cls in type(module).__mro__ if name in vars(cls) and _is_model_code(cls)]
            waiting.append(function.__globals__.get(name))
    return list(found.values())


def _plain_function(value: object) -> types.FunctionType | None:
    """Return the Python function behind a method, a property or a decorator, unless it is torch's own machinery."""
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) else value
    if not isinstance(value, types.FunctionType):
        return None
    origin = str(value.__module__)
    return None if origin.startswith("torch.") and not origin.startswith("torch.nn.modules.") else value


def _is_model_code(cls: type) -> bool:
    # The forward of torch's encoders reads weights on a path that compiled models never take.
    return cls not in (object, nn.Module, *FAST_PATHS)


def _has_contents(cell: types.CellType) -> bool:
    try:
        return isinstance(cell.cell_contents, types.FunctionType)
    except ValueError:  # not filled yet
        return False


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


def _reads(attribute: str, names: tuple[str, ...]) -> bool:
    """Return whether an attribute is among the names, and more than its shape or type is read."""
    if attribute not in names:
        return False
    behind = [name for name in names[names.index(attribute) + 1 :] if name != "data"]
    return not behind or behind[0] not in METADATA
