"""Proxies that notice the questions that they answer themselves: each answer silently chooses a branch of the code."""

import operator
import sys
from collections.abc import Callable

from torch import fx

from nmcompile.capture.frames import instruction, is_asker
from nmcompile.capture.writes import AUGMENTED


class CarefulTracer(fx.Tracer):
    """A tracer that notes why its trace may differ from the code."""

    def __init__(self) -> None:
        super().__init__()
        self.complaints: dict[str, None] = {}

    def complain(self, reason: str) -> None:
        """Note why the trace may not replace the code."""
        self.complaints[reason] = None

    def proxy(self, node: fx.Node) -> "WatchedProxy":
        return WatchedProxy(node, self)


class WatchedProxy(fx.Proxy):
    """A proxy that tells its tracer which questions the code asks it.

    `x += y` and `x.data = y` are recorded as writes, as they are for tensors. fx would record `x + y` and nothing.
    """

    tracer: CarefulTracer

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("tracer", "node"):
            super().__setattr__(name, value)
        else:
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})

    def __getattr__(self, name: str) -> "WatchedAttribute":  # type: ignore[override]
        frame = sys._getframe(1)
        if is_asker(frame) and not instruction(frame).startswith(("LOAD_ATTR", "LOAD_METHOD", "BEFORE_WITH")):
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

    def __deepcopy__(self, memo: object) -> "WatchedProxy":
        return self.__copy__()

    def _notice(self, question: str) -> None:
        if is_asker(sys._getframe(2)):
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

    def __call__(self, *args: object, **kwargs: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


def _augmented(function: Callable[..., object]) -> Callable[[WatchedProxy, object], fx.Proxy]:
    def method(self: WatchedProxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in AUGMENTED:
    setattr(WatchedProxy, f"__{_name}__", _augmented(getattr(operator, _name)))
