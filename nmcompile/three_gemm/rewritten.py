"""The classes of rewritten modules, made at run time: each derives from a mixin and from the module's own class."""

import copy
from collections.abc import Callable, Iterable
from typing import SupportsIndex
from weakref import WeakValueDictionary

from torch import fx, nn

from nmcompile.arguments import Args
from nmcompile.errors import ConfigError
from nmcompile.ir.generated_code import GeneratedModule
from nmcompile.three_gemm.by_hand import BY_HAND, routed_methods
from nmcompile.three_gemm.instance_forward import GENERATED, change_class

RESERVED = ("three_gemms", "three_gemm_graph", "three_gemm_routes", BY_HAND, "absorbing_layer")
"""Names under which rewritten modules keep additional state in their `__dict__`."""


class Rewritten:
    """Mixin of every module whose class was changed; its additional state is in the module's `__dict__`."""

    PREFIX = "ThreeGemm"

    def __reduce_ex__(self, protocol: SupportsIndex) -> Args:
        # The class is made at run time, so its ingredients are pickled (and copied) instead.
        mixin, base = type(self).__bases__
        return rebuild, (mixin, base, *made_from(self)), self.__dict__


def made_from(module: object) -> tuple[fx.Graph | None, tuple[str, ...]]:
    """Return the graph and the names of the routed methods from which the class of a rewritten module is made."""
    return module.__dict__.get("three_gemm_graph"), tuple(module.__dict__.get(BY_HAND, ()))


def put_class(module: nn.Module, mixin: type[Rewritten]) -> None:
    """Give `module` a subclass of its own class and the mixin."""
    change_class(module, _layer_class(mixin, type(module), tuple(module.__dict__.get(BY_HAND, ()))))


_classes: "WeakValueDictionary[tuple[type, type, tuple[str, ...]], type[nn.Module]]" = WeakValueDictionary()


def _layer_class(mixin: type[Rewritten], base: type[nn.Module], methods: tuple[str, ...]) -> type[nn.Module]:
    """Return the class for a mixin, a base and its routed methods, which equal layers share as long as one has it."""
    found = _classes.get((mixin, base, methods))
    if found is None:
        members = {"__module__": base.__module__, **routed_methods(base, methods)}
        found = _classes[mixin, base, methods] = type(f"{mixin.PREFIX}{base.__name__}", (mixin, base), members)
    return found


def generated_forward(graph: fx.Graph) -> Callable[..., object]:
    """Return the function whose code a graph generates."""
    # Only the generated code is wanted; the module itself will hold the attributes that it names. The stored graph gets
    # no owner, which would be pickled with it.
    attributes = {str(node.target): None for node in graph.nodes if node.op in ("call_module", "get_attr")}
    forward: Callable[..., object] = type(GeneratedModule(attributes, copy.deepcopy(graph))).forward
    setattr(forward, GENERATED, True)
    return forward


def region_class(
    mixin: type[Rewritten], base: type[nn.Module], graph: fx.Graph, methods: Iterable[str] = ()
) -> type[nn.Module]:
    """Make a class of the mixin and the base whose forward is the code of a graph, with these methods routed."""
    members = {"__module__": base.__module__, **routed_methods(base, methods), "forward": generated_forward(graph)}
    return type(f"ThreeGemm{base.__name__}", (mixin, base), members)


def rebuild(
    mixin: type[Rewritten], base: type[nn.Module], graph: fx.Graph | None, methods: tuple[str, ...] = ()
) -> nn.Module:
    """Make an empty module of the class that `put_class` or `region_class` makes from class `base`."""
    plain = base.__new__(base)
    if graph is not None:
        plain.__class__ = region_class(mixin, base, graph, methods)
    else:
        plain.__class__ = _layer_class(mixin, base, methods)
    return plain


def check_names(model: nn.Module) -> None:
    """Raise if a plain module uses a name that a rewritten one needs.

    Raises:
        ConfigError: names the module.
    """
    for path, module in model.named_modules():
        own = {*vars(module), *module._modules, *module._parameters, *module._buffers}
        for name in RESERVED:
            if not isinstance(module, Rewritten) and (name in own or hasattr(type(module), name)):
                raise ConfigError(
                    f"module {path!r} ({type(module).__name__}) has an attribute {name!r}, under which a compiled "
                    "module keeps its graphs; rename it"
                )
