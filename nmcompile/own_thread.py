"""Keep what fx and torch.export change for a whole process to the thread that traces, one thread at a time."""

import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch.fx import _symbolic_trace as symbolic

_lock = threading.RLock()
_OWN = "nmcompile_own"
"""Marks the `Tracer.trace` of a thread that traces alone."""


@contextmanager
def tracing_alone() -> Iterator[None]:
    """Wait until no other thread traces or compiles, then let fx patch torch for this thread alone."""
    with _compile_lock(), _lock:
        plain = symbolic.Tracer.trace
        if hasattr(plain, _OWN):  # this thread traces already
            yield
            return
        here = OnThread()
        # The same code with a patcher, and a flag that says that fx traces, of its own. torch.compile wraps it.
        inner = inspect.unwrap(plain)
        own = FunctionType(inner.__code__, vars(symbolic) | {"_new_patcher": _own_patcher}, "trace", inner.__defaults__)

        def trace(*args: Any, **kwargs: Any) -> fx.Graph:
            graph: fx.Graph = (own if here else plain)(*args, **kwargs)
            return graph

        setattr(trace, _OWN, True)
        flag = _replaced(symbolic, "_is_fx_tracing_flag", here)
        with _replaced(symbolic.Tracer, "trace", trace), flag:
            yield


@contextmanager
def exporting_alone() -> Iterator[None]:
    """Do the same for `torch.export`, which also says to the whole process that it compiles."""
    from torch.export import _trace

    with tracing_alone(), _replaced(_trace, "_compiling_state_context", _compiling_here):
        yield


@contextmanager
def _compiling_here() -> Iterator[None]:
    # Nothing asks the second flag except what traces itself.
    is_exporting = _replaced(torch.compiler, "_is_exporting_flag", True)
    with _replaced(torch.compiler, "_is_compiling_flag", OnThread()), is_exporting:
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _compile_lock() -> AbstractContextManager[Any]:
    """Dynamo's own lock, which it holds while it compiles; that traces too."""
    lock: AbstractContextManager[Any] = getattr(
        sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", nullcontext()
    )
    return lock


@contextmanager
def silent() -> Iterator[None]:
    """Drop what this thread prints and logs."""
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

    def __or__(self, other: Any) -> Any:
        return bool(self) | other

    def __and__(self, other: Any) -> Any:
        return bool(self) & other

    __ror__, __rand__ = __or__, __and__

    def differs(self, record: logging.LogRecord) -> bool:
        """Whether a message is another thread's."""
        return record.thread != self.thread


class _Muted:
    """A stream to which one thread writes nothing."""

    def __init__(self, stream: Any, here: OnThread) -> None:
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
    """Patches methods of torch's classes, `nn.Module.__call__` above all, for the thread that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.here = OnThread()

    def patch_method(self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        """Replace a method; other threads run the one that was there."""
        original = getattr(cls, name)

        @functools.wraps(new_fn)
        def method(*args: Any, **kwargs: Any) -> Any:
            return (new_fn if self.here else original)(*args, **kwargs)

        super().patch_method(cls, name, method, deduplicate)
