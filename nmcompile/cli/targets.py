"""The arguments that commands share: a model as package.module:factory, and example inputs as f32[8,3,224,224]."""

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable
from inspect import signature
from typing import TYPE_CHECKING, Any

from nmcompile.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32"}


class TargetError(ConfigError):
    """A package.module:factory that does not name a factory."""


def factory_of(name: str) -> Callable[[], Any]:
    """Return the user's object of that name, which must be callable without arguments."""
    factory = named(name)
    reason = _refusal(factory)
    if reason:
        raise TargetError(
            f"{name!r} is not a factory ({reason}); name a function or class that is called without arguments"
        )
    return factory


def named(name: str) -> Callable[..., Any]:
    """Return the user's object that is named package.module:attribute."""
    if os.getcwd() not in sys.path:  # as for `python -m`
        sys.path.insert(0, os.getcwd())
    module, _, attribute = name.partition(":")
    try:
        if module.startswith("."):
            raise ImportError("the name is relative")
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise TargetError(f"cannot find {name!r} ({error}); write it as in package.module:factory") from error
    return found


def _refusal(factory: object) -> str:
    """Return why something is not a factory; "" if it is one."""
    from torch import nn

    if isinstance(factory, nn.Module) or not callable(factory):
        return f"it is of type {type(factory).__name__}"
    try:
        signature(factory).bind()
    except TypeError as error:
        return str(error)
    except ValueError:
        pass  # a builtin without a signature
    return ""


def model_of(name: str) -> "nn.Module":
    """Return the model that a factory makes."""
    from torch import nn

    model = factory_of(name)()
    if not isinstance(model, nn.Module):
        raise TargetError(f"{name!r} returns something of type {type(model).__name__}; let it return an nn.Module")
    return model


def examples_of(texts: Iterable[str]) -> "tuple[Tensor, ...]":
    """Return random inputs, which tell models apart: zeros stay zeros in layers without bias and standardize to NaN."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return tuple(_example(text, generator) for text in texts)


def _example(text: str, generator: "torch.Generator") -> "Tensor":
    import torch

    match = re.fullmatch(r"(\w+)\[(\d+(?:,\d+)*)\]", text.replace(" ", ""))
    if match is None or match[1] not in DTYPES:
        raise ConfigError(f"input {text!r} is not of the form f32[8,3,224,224]; dtypes: {', '.join(DTYPES)}")
    shape, dtype = [int(size) for size in match[2].split(",")], getattr(torch, DTYPES[match[1]])
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype, generator=generator)
    return torch.randint(2, shape, dtype=dtype, generator=generator)  # 0 and 1 are indices of any embedding
