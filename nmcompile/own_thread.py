"""Process-wide changes of fx and torch.export, confined to the tracing thread; one thread traces at a time."""

import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from types import FunctionType
from typing import Any, ParamSpec, TextIO, TypeVar

import torch
from torch import fx
from torch.fx import _symbolic_trace as symbolic
from torch.fx import graph_module

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.RLock()
_OWN = "nmcompile_own"
"""Attribute that marks the `Tracer.trace` of a thread that traces alone."""


@contextmanager
def tracing_alone() -> Iterator[None]:
    """Wait until no other thread traces or compiles, then let fx patch torch for this thread alone."""
    with _compile_lock(), _lock:
        plain: Callable[..., fx.Graph] = symbolic.Tracer.trace
        if hasattr(plain, _OWN):  # this thread traces already
            yield
            return
        here = OnThread()
        # The code of `Tracer.trace` with its own patcher and its own flag "fx traces". torch.compile wraps the method.
        inner = inspect.unwrap(plain)
        own = FunctionType(inner.__code__, vars(symbolic) | {"_new_patcher": _own_patcher}, "trace", inner.__defaults__)

        def trace(*args: object, **kwargs: object) -> fx.Graph:
            return own(*args, **kwargs) if here else plain(*args, **kwargs)

        setattr(trace, _OWN, True)
        flag = _replaced(symbolic, "_is_fx_tracing_flag", here)
        with _replaced(symbolic.Tracer, "trace", trace), flag:
            yield


@contextmanager
def exporting_alone() -> Iterator[None]:
    """Do as `tracing_alone`, and confine the flags by which `torch.export` says that the whole process compiles."""
    from torch.export import _trace

    # fx would store the source of every graph that export makes on the way, for as long as the process lives.
    sources = _replaced(graph_module, "_loader", _NoSources(graph_module._loader))
    with tracing_alone(), _replaced(_trace, "_compiling_state_context", _compiling_here), sources:
        yield


@contextmanager
def _compiling_here() -> Iterator[None]:
    # Only code that traces reads the second flag, so it may be set for all threads.
    is_exporting = _replaced(torch.compiler, "_is_exporting_flag", True)
    with _replaced(torch.compiler, "_is_compiling_flag", OnThread()), is_exporting:
        yield


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _compile_lock() -> AbstractContextManager[object]:
    """Return Dynamo's own lock, held while Dynamo compiles, which traces too."""
    lock: AbstractContextManager[object] = getattr(
        sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", nullcontext()
    )
    return lock


@contextmanager
def silent() -> Iterator[None]:
    """Drop everything that this thread prints and logs."""
    here = OnThread()
    loggers = [logging.root, *list(logging.root.manager.loggerDict.values())]
    handlers = {handler for one in loggers for handler in getattr(one, "handlers", ())} | {logging.lastResort}
    for handler in filter(None, handlers):
        handler.addFilter(here.differs)
    try:
        with redirect_stdout(_Muted(sys.stdout, here)), redirect_stderr(_Muted(sys.stderr, here)):
            yield
    finally:
        for handler in filter(None, handlers):
            handler.removeFilter(here.differs)


class OnThread:
    """A flag that is true on the thread that made it."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self.thread

    def __or__(self, other: bool) -> bool:
        return bool(self) | other

    def __and__(self, other: bool) -> bool:
        return bool(self) & other

    __ror__, __rand__ = __or__, __and__

    def differs(self, record: logging.LogRecord) -> bool:
        """Return whether a log record comes from another thread."""
        return record.thread != self.thread


class _NoSources:
    """A store of generated sources to which one thread adds nothing."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.here = OnThread()

    def cache(self, *args: Any, **kwargs: Any) -> str:
        """Return the file name that stands for the source."""
        return "<eval_with_key>" if self.here else str(self.store.cache(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


class _Muted:
    """A stream that drops the writes of one thread."""

    def __init__(self, stream: TextIO, here: OnThread) -> None:
        self.stream = stream
        self.here = here

    def write(self, text: str) -> int:
        return len(text) if self.here else int(self.stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def _own_patcher() -> Iterator["_OwnPatcher"]:
    patcher = _OwnPatcher()
    with _replaced(symbolic, "CURRENT_PATCHER", patcher), patcher:
        yield patcher


class _OwnPatcher(symbolic._Patcher):
    """A patcher of methods of torch's classes, above all `nn.Module.__call__`, for the thread that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.here = OnThread()

    def patch_method(self, cls: type, name: str, new_fn: Callable[P, R], deduplicate: bool = True) -> None:
        """Replace a method for this thread; other threads run the original."""
        original: Callable[P, R] = getattr(cls, name)

        @functools.wraps(new_fn)
        def method(*args: P.args, **kwargs: P.kwargs) -> R:
            return (new_fn if self.here else original)(*args, **kwargs)

        super().patch_method(cls, name, method, deduplicate)
