"""Checks of user arguments: each raises an error that names the argument, its value, and what to give instead."""

import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import UnionType

from torch import Tensor, nn

from nmcompile.errors import ConfigError, OperandError, nearest
from nmcompile.printable import printable

HUGE = 2**64


def check_kind(name: str, value: object, kind: type[object] | UnionType, expected: str) -> None:
    """Raise unless the argument `name` is an instance of `kind`; `expected` tells the user what to give."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is {described(value)}; give {expected}")


def check_compiled(name: str, value: object) -> None:
    """Raise unless the argument `name` is a module. Callers check that it is compiled where they need that."""
    check_kind(name, value, nn.Module, "a model that nmcompile.compile made")


def check_number(
    name: str, value: object, kind: type[Integral | Real], least: float, most: float, expected: str
) -> None:
    """Raise unless the argument `name` is a number from `least` to `most`; True and False are not numbers."""
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= _plain(value) <= most:
        raise ConfigError(f"{name} is {described(value)}; give {expected}")


def _plain(number: Integral | Real) -> int | float:
    """Convert to Python's own number: NumPy's narrow types do not compare with large numbers."""
    return int(number) if isinstance(number, Integral) else float(number)


def check_tensor(name: str, value: object) -> None:
    """Raise OperandError unless the argument `name` is a tensor."""
    if not isinstance(value, Tensor):
        raise OperandError(f"{name} is {described(value)}; give a tensor")


def check_floating(name: str, value: object) -> None:
    """Raise OperandError unless the argument `name` is a floating-point tensor."""
    check_tensor(name, value)
    if isinstance(value, Tensor) and not value.is_floating_point():
        raise OperandError(f"{name} is {value.dtype}; give a floating-point tensor")


def check_call(args: object, kwargs: object) -> None:
    """Raise unless `args` is a tuple and `kwargs` a dict, or None; a bare tensor has a misleading truth value."""
    check_kind("args", args, tuple | None, "a tuple of the model's positional inputs, args=(x,) for a single one")
    check_kind("kwargs", kwargs, Mapping | None, "a dict of the model's inputs by name")
    for key in kwargs if isinstance(kwargs, Mapping) else ():
        check_kind("a key of kwargs", key, str, "the name of an argument of the model's forward")


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise unless the argument `name` is one of the known names."""
    choices = tuple(known)
    check_kind(name, value, str, f"one of {', '.join(choices)}")
    if value not in choices:
        raise ConfigError(f"{name} {value!r} is unknown; {nearest(str(value), choices)}")


def check_path(name: str, value: object) -> Path:
    """Return the argument `name` as a path; raise for text that cannot name a file."""
    expected = "a path as text, or a pathlib.Path"
    check_kind(name, value, str | os.PathLike, expected)
    assert isinstance(value, str | os.PathLike)
    text = os.fspath(value)
    check_kind(name, text, str, expected)
    try:
        is_name = "\0" not in text and os.fsencode(text) != b""
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise ConfigError(f"{name} is {described(text)}, which no file can be called; give {expected}")
    return Path(text)


def check_callable(name: str, value: object, expected: str) -> None:
    """Raise unless the argument `name` can be called."""
    if not callable(value):
        raise ConfigError(f"{name} is {described(value)}; give {expected}")


def described(value: object) -> str:
    """Return the value's repr if it is short, else its type."""
    if isinstance(value, Integral) and abs(int(value)) >= HUGE:
        return "an integer of more than 64 bits"
    is_short = value is None or isinstance(value, str | Real)
    return printable(repr(value)) if is_short else f"of type {type(value).__name__}"
