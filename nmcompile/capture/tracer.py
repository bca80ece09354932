"""Tracing of one module with fx, with its children as calls. Notes where the trace may differ from the code."""

import dis
import gc
import inspect
import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._python_dispatch import TorchDispatchMode

from nmcompile.capture.unseen import unseen_tests
from nmcompile.capture.writes import AUGMENTED, storage_key, written_arguments
from nmcompile.own_thread import tracing_alone

# Modules whose frames only relay a type test; the frame that asks is further up the stack.
RELAYS = {"abc", "_abc", "typing", "_collections_abc", "torch.nn.parameter"}
PLAIN_CONTAINERS = (dict, list, tuple, torch.Size, immutable_dict, immutable_list)
TRUSTED = ("torch.fx", "torch.overrides", "torch.utils._pytree", "torch.nn.modules.module", __name__)
CHECKPOINT = inspect.unwrap(torch.utils.checkpoint.checkpoint).__code__


class ModuleTracer(fx.Tracer):
    """An fx tracer that records every child as a call.

    Args:
        bindings: values that replace the proxies of arguments, by argument name.
        protected: the storages that must not be written to.
    """

    proxy_buffer_attributes = True

    def __init__(self, bindings: Mapping[str, Any] | None = None, protected: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.bindings = bindings or {}
        self.protected = protected
        self.complaints: dict[str, None] = {}
        self.tested_for_none: set[str] = set()

    def complain(self, reason: str) -> None:
        """Note why the trace may not replace the code."""
        self.complaints[reason] = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> "WatchedProxy":
        return WatchedProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, WatchedProxy):
            return a.node
        if isinstance(a, dict | list | tuple) and not (type(a) in PLAIN_CONTAINERS or hasattr(a, "_fields")):
            self.complain(f"it makes an object of class {type(a).__name__}, for which a trace has a plain container")
        before = len(self.tensor_attrs)
        result = super().create_arg(a)
        if len(self.tensor_attrs) != before:
            self.complain("it computes a tensor constant while tracing")
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if _modes() != self.modes:
            self.complain("it changes the grad mode or autocast")
        return node

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        placed = [str(arg.node.target) if isinstance(arg, WatchedProxy) else "" for arg in args]
        return function, [self.bindings.get(name, arg) for name, arg in zip(placed, args, strict=True)]

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self.modes = _modes()
        with tracing_alone(), warnings.catch_warnings(), _watch_calls(self), Guard(self, self.protected):
            warnings.simplefilter("ignore")
            return super().trace(root, concrete_args)


class WatchedProxy(fx.Proxy):
    """A proxy that notices the questions that it answers itself: the answer silently sends the code down one branch.

    `x += y` and `x.data = y` are recorded as writes, which they are for tensors; fx would record `x + y` and nothing.
    """

    tracer: ModuleTracer

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("tracer", "node"):
            super().__setattr__(name, value)
        else:
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})

    def __getattr__(self, name: str) -> "WatchedAttribute":  # type: ignore[override]
        frame = sys._getframe(1)
        if _is_asker(frame) and not _instruction(frame).startswith(("LOAD_ATTR", "LOAD_METHOD", "BEFORE_WITH")):
            self.tracer.complain(f"its code asks whether a value has the attribute {name!r}")
        return WatchedAttribute(self, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        self._notice("tests the type of an argument")
        return WatchedProxy

    def __hash__(self) -> int:
        self._notice("looks a value up in a dict or a set")
        return super().__hash__()

    def __repr__(self) -> str:
        self._notice("turns a value into text")
        return super().__repr__()

    def __copy__(self) -> "WatchedProxy":
        raise TypeError("its code copies a value, which a trace would share")

    def __deepcopy__(self, memo: Any) -> "WatchedProxy":
        return self.__copy__()

    def _notice(self, question: str) -> None:
        if _is_asker(sys._getframe(2)):
            self.tracer.complain(f"its code {question}")


class WatchedAttribute(WatchedProxy):
    """An attribute of a proxy, which becomes a node if it is used as anything but a method."""

    root: WatchedProxy
    attr: str
    made: fx.Node | None

    def __init__(self, root: WatchedProxy, name: str) -> None:
        self.__dict__.update(tracer=root.tracer, root=root, attr=name, made=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self.made is None:
            self.__dict__["made"] = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {}).node
        assert self.made is not None
        return self.made

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


def _augmented(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: WatchedProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in AUGMENTED:
    setattr(WatchedProxy, f"__{_name}__", _augmented(getattr(operator, _name)))


def _is_asker(frame: FrameType | None) -> bool:
    """Return whether the frame that asks something of a proxy is the model's own code."""
    while frame is not None and _module_of(frame) in RELAYS:
        frame = frame.f_back
    return frame is not None and not _module_of(frame).startswith(TRUSTED)


LIBRARIES = {"torch", "nmcompile", *sys.stdlib_module_names}


def _is_model_code(frame: FrameType) -> bool:
    return _module_of(frame).split(".")[0] not in LIBRARIES


def _is_aside(frame: FrameType | None) -> bool:
    """Return whether the frame runs for an import or a finalizer, which can happen anywhere and sees no proxies."""
    while frame is not None and frame.f_code is not ModuleTracer.trace.__code__:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _instruction(frame: FrameType) -> str:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]]


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


_READS = {
    torch.is_autocast_enabled: "its code asks whether autocast is on",
    torch.is_autocast_cpu_enabled: "its code asks whether autocast is on",
    torch.is_grad_enabled: "its code asks whether gradients are on",
    operator.is_: "its code calls operator.is_",
    operator.is_not: "its code calls operator.is_not",
}


@contextmanager
def _watch_calls(tracer: ModuleTracer) -> Iterator[None]:
    """Notice what leaves no node: activation checkpointing, questions about autocast or the grad mode, unseen tests."""
    previous = sys.getprofile()

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code is CHECKPOINT:
            tracer.complain("it calls torch.utils.checkpoint, which a trace would lose")
        elif event == "call" and _is_model_code(frame):
            reasons = list(unseen_tests(frame, tracer.tested_for_none))
            if reasons and not _is_aside(frame):
                tracer.complaints.update(dict.fromkeys(reasons))
        elif event == "c_call" and arg in _READS and _is_model_code(frame):
            tracer.complain(_READS[arg])

    # The garbage collector would run finalizers and callbacks as if the forward called them.
    collects = gc.isenabled()
    gc.disable()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(previous)
        if collects:
            gc.enable()


class Guard(TorchDispatchMode):
    """A watch over the real operators in a trace: they may not write the model's tensors or draw random numbers."""

    def __init__(self, tracer: ModuleTracer, protected: frozenset[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.protected = protected

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.tracer.complain("it draws random numbers")
        if func._schema.is_mutable and self._writes_protected(written_arguments(func, args, kwargs)):
            raise RuntimeError("it changes a tensor of the model in place")
        return func(*args, **kwargs)

    def _writes_protected(self, written: list[Any]) -> bool:
        return any(isinstance(tensor, Tensor) and storage_key(tensor) in self.protected for tensor in written)
