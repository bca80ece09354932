"""Attributes that code reads, found in its bytecode: `self.a.weight` is the chain ("a", "weight") of self."""

import dis
import functools
import inspect
import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from nmcompile.capture.regions import names_in
from nmcompile.ir.element_reads import METADATA
from nmcompile.three_gemm.fast_paths import FAST_PATHS


@dataclass(frozen=True)
class Chain:
    """Names as in `a.b.c`: the attributes of `self`, or of another value."""

    of_self: bool
    names: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def attribute_chains(code: types.CodeType) -> tuple[Chain, ...]:
    """Return every chain of attributes that a function and its inner functions read."""
    return tuple(_chains(code, "self" if code.co_varnames[:1] == ("self",) else ""))


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


def forward_functions(module: nn.Module) -> list[types.FunctionType]:
    """Return the functions that a call of the module may run."""
    return reachable_functions(type(module), module.__dict__.get("forward", type(module).forward))


def reachable_functions(cls: type[nn.Module], start: object, aside: Collection[str] = ()) -> list[types.FunctionType]:
    """Return the functions that a method may run, judged by name: methods of the same class, and plain functions.

    Methods in `aside` are not followed.
    """
    found: dict[types.CodeType, types.FunctionType] = {}
    waiting = [start]
    while waiting:
        function = _plain_function(waiting.pop())
        if function is None or function.__code__ in found:
            continue
        found[function.__code__] = function
        waiting += [cell.cell_contents for cell in function.__closure__ or () if _has_contents(cell)]
        for name in set(names_in(function.__code__)).difference(aside):
            waiting += [vars(one)[name] for one in cls.__mro__ if name in vars(one) and is_model_code(one)]
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


def is_model_code(cls: type) -> bool:
    """Return whether the methods of a class may run when a model runs."""
    # The forward of torch's encoders reads weights on a path that compiled models never take.
    return cls not in (object, nn.Module, *FAST_PATHS)


def _has_contents(cell: types.CellType) -> bool:
    try:
        return isinstance(cell.cell_contents, types.FunctionType)
    except ValueError:  # not filled yet
        return False


def reads_elements(attribute: str, names: tuple[str, ...]) -> bool:
    """Return whether an attribute is among the names, and more than its shape or type is read; a write is no read."""
    if attribute not in names:
        return False
    behind = [name for name in names[names.index(attribute) + 1 :] if name != "data"]
    return not behind or not (behind[0] in METADATA or behind[0].endswith("_"))
