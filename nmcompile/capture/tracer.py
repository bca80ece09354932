"""Tracing of one module with fx, with its children as calls. Notes where the trace may differ from the code."""

import warnings
from collections.abc import Callable

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import Argument, Target

from nmcompile.arguments import Args, Kwargs
from nmcompile.capture.watch_calls import Guard, watch_calls
from nmcompile.capture.watched_proxy import CarefulTracer, WatchedProxy
from nmcompile.own_thread import tracing_alone

PLAIN_CONTAINERS = (dict, list, tuple, torch.Size, immutable_dict, immutable_list)


class ModuleTracer(CarefulTracer):
    """An fx tracer that records every child as a call.

    Args:
        bindings: values that replace the proxies of arguments, by argument name.
        protected: the storages that must not be written to.
    """

    proxy_buffer_attributes = True

    def __init__(self, bindings: Kwargs | None = None, protected: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.bindings = bindings or {}
        self.protected = protected
        self.tested_for_none: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: object) -> Argument:
        if isinstance(a, WatchedProxy):
            return a.node
        if isinstance(a, dict | list | tuple) and not (type(a) in PLAIN_CONTAINERS or hasattr(a, "_fields")):
            self.complain(f"it makes an object of class {type(a).__name__}, for which a trace has a plain container")
        before = len(self.tensor_attrs)
        result = super().create_arg(a)
        if len(self.tensor_attrs) != before:
            self.complain("it computes a tensor constant while tracing")
        return result

    def create_node(
        self,
        kind: str,
        target: Target,
        args: tuple[Argument, ...],
        kwargs: dict[str, Argument],
        name: str | None = None,
        type_expr: object = None,
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if _modes() != self.modes:
            self.complain("it changes the grad mode or autocast")
        return node

    def create_args_for_root(
        self, root_fn: Callable[..., object], is_module: bool, concrete_args: dict[str, object] | Args | None = None
    ) -> tuple[object, list[object]]:
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        placed = [str(arg.node.target) if isinstance(arg, WatchedProxy) else "" for arg in args]
        return function, [self.bindings.get(name, arg) for name, arg in zip(placed, args, strict=True)]

    def trace(
        self, root: nn.Module | Callable[..., object], concrete_args: dict[str, object] | None = None
    ) -> fx.Graph:
        self.modes = _modes()
        with (
            tracing_alone(),
            warnings.catch_warnings(),
            watch_calls(self, self.tested_for_none),
            Guard(self, self.protected),
        ):
            warnings.simplefilter("ignore")
            return super().trace(root, concrete_args)


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
