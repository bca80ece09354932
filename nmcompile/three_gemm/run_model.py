"""Calls of a model with a batch of a data loader, matched to the signature of the model's forward."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from nmcompile.arguments import Args, Kwargs
from nmcompile.errors import CalibrationError, NMCompileError, OperandError

TAKEN = (
    "give a tensor, a mapping of forward's arguments by name, or (inputs, labels), where inputs is a tensor, such a "
    "mapping, or a tuple or list of the arguments"
)
Call = tuple[Args, dict[str, object]]
SHOWN = 8  # entries of a container in a message
SEQUENCE = re.compile(r"(typing\.|collections\.abc\.)?(list|tuple|sequence)\b", re.IGNORECASE)


def run_batch(model: nn.Module, batch: object, name: str = "the batch") -> object:
    """Call a model with a batch; `name` identifies the batch in messages.

    Raises:
        CalibrationError: forward takes no such batch, or fails on it.
    """
    signature = _signature(model)
    args, kwargs = _call(signature, batch)
    try:
        signature.bind(*args, **kwargs)
        return model(*args, **kwargs)
    except Exception as error:  # from the model's own code, or from a layer about its input
        if isinstance(error, NMCompileError) and not isinstance(error, OperandError):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        forward = f"{type(model).__name__}.forward({', '.join(signature.parameters)})"
        raise CalibrationError(f"{name} is {shown(batch)}, on which {forward} fails: {reason}; {TAKEN}") from error


def shown(value: object) -> str:
    """Return the types and shapes in a batch as text."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "" if isinstance(value, Tensor) else "numpy "
        return f"{kind}{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} {{{_listed(f'{key!r}: {shown(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} ({_listed(map(shown, value))})"
    return "None" if value is None else f"of type {type(value).__name__}"


def _listed(parts: Iterable[str]) -> str:
    listed = list(parts)
    rest = f", ... {len(listed)} in all" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + rest


def _signature(model: nn.Module) -> inspect.Signature:
    """Return the signature of forward, or that of the only child if a wrapper such as DDP passes on all arguments."""
    signature = inspect.signature(model.forward)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    children = list(model.children())
    is_wrapper = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} and len(children) == 1
    return _signature(children[0]) if is_wrapper else signature


def _call(signature: inspect.Signature, batch: object) -> Call:
    """Return the arguments and keyword arguments that a batch represents."""
    if isinstance(batch, Mapping):
        return _by_name(signature, batch)
    if not isinstance(batch, list | tuple) or isinstance(batch, PackedSequence):
        return (batch,), {}
    first = batch[0] if batch else None
    if _takes_sequence(signature) and not isinstance(first, list | tuple | Mapping):
        return (batch,), {}
    if isinstance(first, Mapping):
        return _by_name(signature, first)
    required, most = _positional(signature)
    if not isinstance(first, list | tuple):
        return tuple(batch[: max(required, 1)]), {}
    is_arguments = required <= len(first) <= most and not _takes_sequence(signature)
    return (tuple(first) if is_arguments else (first,)), {}


def _by_name(signature: inspect.Signature, batch: Kwargs) -> Call:
    """Return the entries that forward takes, without labels, say; or the mapping itself if forward takes that."""
    parameters = signature.parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not named.intersection(batch) and not (takes_all and _positional(signature)[0] == 0):
        return (batch,), {}
    return (), {key: value for key, value in batch.items() if takes_all or key in named}


def _positional(signature: inspect.Signature) -> tuple[int, float]:
    """Return how many positional arguments forward needs, and the most that it takes."""
    parameters = signature.parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    is_open = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return sum(p.default is p.empty for p in positional), float("inf") if is_open else len(positional)


def _takes_sequence(signature: inspect.Signature) -> bool:
    """Return whether the first argument is annotated as a list or tuple, of images for example."""
    first = next(iter(signature.parameters.values()), None)
    if first is None or first.annotation is first.empty:
        return False
    annotation = first.annotation
    return (
        SEQUENCE.match(annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)) is not None
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode inside this context; restore its mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
