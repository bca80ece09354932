"""Results as JSON: dataclasses as objects, patterns and paths as text, NaN and infinities as null."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum

import click

SCHEMA_VERSION = 1


def echo_json(**content: object) -> None:
    """Print an object with its schema's version."""
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2, default=plain))


def plain(value: object) -> object:
    """Return a value of what JSON has, however deep; anything else as its text."""
    from nmcompile.pruning.pattern import NMPattern

    if is_dataclass(value) and not isinstance(value, type | NMPattern):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
