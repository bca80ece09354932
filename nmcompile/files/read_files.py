"""Reading of files from others: regular files of a bounded size, and JSON whose shape is checked."""

import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import NoReturn, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

from nmcompile.checks import described
from nmcompile.errors import FileError, NMCompileError, nearest

LARGEST_JSON = 2**20  # characters
DEEPEST = 32  # nested lists and objects
DIGITS = 20  # digits of a 64-bit integer
OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)

SCALARS: dict[object, tuple[object, ...]] = {float: (int, float), None: (NoneType,)}
"""Types of JSON values that a declared type takes; a declared type that is not listed takes itself."""

T = TypeVar("T")


def read_regular(path: str | os.PathLike[str], largest: int) -> bytes:
    """Return the content of a regular file, without ever blocking on it or allocating more than `largest` bytes.

    Raises:
        FileError: the file is missing, not regular (a folder, FIFO or device), or larger than `largest` bytes.
    """
    try:
        descriptor = os.open(path, OPEN)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FileError(f"{path}: not a regular file")
            if status.st_size > largest:
                raise FileError(f"{path}: {status.st_size} bytes; at most {largest} are read")
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(status.st_size + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise error if isinstance(error, FileError) else FileError(f"{path}: cannot be read ({error})") from error
    if len(content) > status.st_size:
        raise FileError(f"{path}: grew while it was read")
    return content


def parse_json(
    text: str | bytes, name: str, *, error: type[NMCompileError] = FileError, largest: int = LARGEST_JSON
) -> object:
    """Return the content of JSON text, read strictly: no repeated key, NaN or infinity, and bounded digits and depth.

    Args:
        text: bytes are UTF-8.
        name: what error messages call the text.
        error: the error to raise.
        largest: largest accepted length of the text.
    """
    if len(text) > largest:
        raise error(f"{name} is not JSON of at most {largest} characters: it has {len(text)}")
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        document = json.loads(
            decoded, object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
        )
        _check_depth(document)
    except (ValueError, RecursionError) as reason:
        raise error(f"{name} is not JSON: {reason or type(reason).__name__}") from reason
    return document


def read_record(kind: type[T], document: object, name: str) -> T:
    """Return a dataclass whose fields, each of its declared type, are those of a JSON object.

    Raises:
        FileError: fields are missing or unknown, or of another type.
    """
    hints = get_type_hints(kind)
    declared = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(document, dict):
        raise FileError(f"{name}: expected an object with {', '.join(declared)}")
    for key in document:
        if key not in declared:
            raise FileError(f"{name}: {key!r} is unknown; {nearest(key, declared)}")
    for key, field in declared.items():
        if key not in document and field.default is MISSING:
            raise FileError(f"{name}: {key!r} is missing")
        if key in document and not fits(document[key], hints[key]):
            expected = getattr(hints[key], "__name__", hints[key])
            raise FileError(f"{name}: {key!r} is {described(document[key])}, expected {expected}")
    return kind(**document)


def fits(value: object, kind: type[T]) -> TypeGuard[T]:
    """Return whether a JSON value is of a type: a scalar type, or a dict, list or union of such types."""
    parts = get_args(kind)
    if isinstance(kind, UnionType):
        return any(fits(value, part) for part in parts)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(fits(item, parts[1]) for item in value.values())
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    return type(value) in SCALARS.get(kind, (kind,))


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} occurs twice in one object")
        found[key] = value
    return found


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError(f"{digits[:DIGITS]} is too large a number")
    return float(digits)


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(document: object) -> None:
    level: list[object] = [document]
    for _ in range(DEEPEST):
        level = [item for one in level for item in _items(one)]
        if not level:
            return
    raise ValueError(f"lists and objects are nested more than {DEEPEST} deep")


def _items(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
