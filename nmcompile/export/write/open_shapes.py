"""Sizes that a file leaves open, in the form of torch.export's `dynamic_shapes`."""

import inspect
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from nmcompile.arguments import Args, Kwargs
from nmcompile.errors import ConfigError, ExportError, nearest

BATCH = "batch"
Shapes = dict[str, object]
"""Open dims by name of forward's arguments: for a tensor a dict from dims to `Dim`s, or None if all are fixed."""


def open_batch(plain: nn.Module, args: Args, kwargs: Kwargs) -> Shapes:
    """Open dim 0 of every input that has the first input's batch size."""
    tensors = [x for x in pytree.tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor) and x.dim()]
    size, batch = tensors[0].shape[0] if tensors else None, Dim(BATCH)

    def opened(x: object) -> dict[int, object] | None:
        return {0: batch} if isinstance(x, Tensor) and x.dim() and x.shape[0] == size else None

    shapes: Shapes = pytree.tree_map(opened, _arguments(plain, args, kwargs))
    return shapes


def open_as_asked(plain: nn.Module, args: Args, kwargs: Kwargs, asked: object) -> Shapes:
    """Return the user's `dynamic_shapes`, checked, by name, with None for arguments that it leaves out.

    Raises:
        ConfigError: an argument, a dim or a size that does not exist.
    """
    arguments = _arguments(plain, args, kwargs)
    if isinstance(asked, tuple | list):
        if len(asked) != len(arguments):
            raise ConfigError(f"dynamic_shapes has {len(asked)} entries; give one for each of {', '.join(arguments)}")
        asked = dict(zip(arguments, asked, strict=True))
    if not isinstance(asked, Mapping):
        raise ConfigError(
            f"dynamic_shapes is of type {type(asked).__name__}; give a dict by the names of forward's arguments, such "
            "as {'x': {0: torch.export.Dim('batch'), 2: torch.export.Dim('height')}}"
        )
    for name in asked:
        if name not in arguments:
            raise ConfigError(
                f"dynamic_shapes names {name!r}, which is not given here; {nearest(str(name), arguments)}"
            )
    return {name: _checked(f"dynamic_shapes[{name!r}]", x, asked.get(name)) for name, x in arguments.items()}


def enlarged(plain: nn.Module, args: Args, kwargs: Kwargs, shapes: Shapes) -> tuple[Args, dict[str, object]]:
    """Return `args` and `kwargs` with 2 in place of 1 in open dims: torch.export takes a size of 1 for a constant."""
    by_tensor = _by_tensor(plain, args, kwargs, shapes)

    def grown(x: Tensor) -> Tensor:
        for dim, size in by_tensor.get(id(x), {}).items():
            if x.shape[dim] == 1 and _is_open(size):
                x = torch.cat([x, x], dim)
        return x

    given: tuple[Args, dict[str, object]] = pytree.tree_map_only(Tensor, grown, (args, dict(kwargs)))
    return given


def names_of(
    plain: nn.Module, args: Args, kwargs: Kwargs, shapes: Shapes, inputs: Sequence[Iterable[int | ir.SymbolicDim]]
) -> dict[str | ir.SymbolicDim, str]:
    """Map torch.export's name of each open size to the name of its `Dim`; `inputs` are the graph's dims."""
    by_tensor = _by_tensor(plain, args, kwargs, shapes)
    tensors = [x for x in pytree.tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor)]
    names: dict[str | ir.SymbolicDim, str] = {}
    for x, dims in zip(tensors, map(tuple, inputs), strict=True):
        for dim, size in by_tensor.get(id(x), {}).items():
            found = dims[dim]
            if isinstance(size, Dim) and isinstance(found, ir.SymbolicDim):
                names.setdefault(str(found.value), size.__name__)
    return names


def _arguments(plain: nn.Module, args: Args, kwargs: Kwargs) -> dict[str, object]:
    try:
        return dict(inspect.signature(plain.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise ExportError(f"{type(plain).__name__} does not take these args and kwargs: {error}") from error


def _checked(place: str, value: object, asked: object) -> object:
    """Return the checked request for one argument, with a dict from dims to sizes for a tensor."""
    if asked is None:
        return None
    if not isinstance(value, Tensor):
        return asked  # a structure of tensors, which torch.export checks
    if isinstance(asked, tuple | list):
        if len(asked) != value.dim():
            raise ConfigError(f"{place} has {len(asked)} entries for a tensor of {value.dim()} dims; give one for each")
        asked = dict(enumerate(asked))
    if not isinstance(asked, Mapping):
        raise ConfigError(
            f"{place} is {asked!r}; give a dict from dims to sizes, such as {{0: torch.export.Dim('batch')}}"
        )
    for dim, size in asked.items():
        if not isinstance(dim, int) or not 0 <= dim < value.dim():
            raise ConfigError(f"{place} opens dim {dim!r} of a tensor of {value.dim()} dims, counted from 0")
        if not (size is None or isinstance(size, int) or _is_open(size) or size is Dim.STATIC):
            raise ConfigError(
                f"{place}[{dim}] is {size!r}; give a size by name, torch.export.Dim({str(size)!r}), or None"
            )
    return dict(asked)


def _is_open(size: object) -> bool:
    return isinstance(size, Dim | type(Dim.AUTO)) and size is not Dim.STATIC


def _by_tensor(plain: nn.Module, args: Args, kwargs: Kwargs, shapes: Shapes) -> dict[int, Mapping[int, object]]:
    found: dict[int, Mapping[int, object]] = {}
    _pair(_arguments(plain, args, kwargs), shapes, found)
    return found


def _pair(value: object, shapes: object, found: dict[int, Mapping[int, object]]) -> None:
    """Note the dims of every tensor in a structure."""
    if isinstance(value, Tensor):
        given = dict(enumerate(shapes)) if isinstance(shapes, tuple | list) else shapes
        found[id(value)] = given if isinstance(given, Mapping) else {}
    elif isinstance(value, Mapping) and isinstance(shapes, Mapping):
        for key, one in value.items():
            _pair(one, shapes.get(key), found)
    elif isinstance(value, Sequence) and isinstance(shapes, Sequence) and not isinstance(value, str):
        for one, shape in zip(value, shapes, strict=False):
            _pair(one, shape, found)
