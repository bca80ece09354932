"""Layers in Python code: weights that a run of the example shows to be multiplied by, and by nothing else read.

def forward(self, x):                        the code runs as it is; its products run
    return F.linear(x, self.experts[i])      as the layer "experts"
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from nmcompile.arguments import Args
from nmcompile.capture.sites import FoundSite
from nmcompile.capture.watch_products import Watched, watch_products
from nmcompile.ir.captured import Captured, Site
from nmcompile.ir.layers import Layer, LinearLayer, StackedLinearLayer
from nmcompile.three_gemm.instance_forward import forward_slot


@dataclass
class Routes:
    """Weights that Python code multiplies by, and that can run as layers.

    Args:
        found: new layers, of the code's own parameters.
        by_module: by name of the module with the code, the layer of each weight by its name.
        untraced: the modules whose code Dynamo does not take: it takes one matrix of a stack, or calls a function that
            multiplies by several weights.
        unread: the layers whose weight was not read by code outside of them.
        read: by layer, the code outside of it that reads its weight, if that is not routed.
    """

    found: list[FoundSite] = field(default_factory=list)
    by_module: dict[str, dict[str, str]] = field(default_factory=dict)
    untraced: set[str] = field(default_factory=set)
    unread: frozenset[str] = frozenset()
    read: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> frozenset[str]:
        return frozenset(layer for layers in self.by_module.values() for layer in layers.values())


def known_routes(model: nn.Module, captured: Captured) -> Routes:
    """Return the routes that an earlier capture of the model found."""
    layers = {layer for layers in captured.routes.values() for layer in layers.values()}
    own = [site for site in captured.sites if site.layer.name in layers and site.role]
    found = [FoundSite(site, frozenset({id(model.get_parameter(site.weight))})) for site in own]
    by_module = {module: dict(layers) for module, layers in captured.routes.items()}
    return Routes(found, by_module, set(captured.untraced))


def find_routes(
    model: nn.Module,
    found: Sequence[FoundSite],
    wanted: frozenset[int],
    generated: frozenset[str],
    args: Args,
    kwargs: Mapping[str, object],
) -> Routes:
    """Run the example and find how Python code multiplies by parameters.

    Args:
        model: the model.
        found: the layers known so far.
        wanted: the ids of the parameters that code without layers may multiply by.
        generated: the modules whose forward is generated.
        args, kwargs: the example.
    """
    names = {id(p): name for name, p in model.named_parameters() if id(p) in wanted}
    routes = Routes()
    if not names:
        return routes
    own = {(one.site.module, parameter) for one in found for parameter in one.parameters}
    watched = watch_products(model, names, own, args, kwargs)
    owners = {one.site.weight: one.site for one in found if not one.site.is_expression}
    touched = {*watched.others, *(name for name, _ in watched.products)}
    if watched.has_run:
        routes.unread = frozenset(
            owners[name].layer.name for name in names.values() if name in owners and name not in touched
        )
    for name in names.values():
        readers = watched.readers(name)
        if name not in watched.others and all(
            _keeps_forward(model, reader, generated) and _is_inside(name, reader) for reader in readers
        ):
            _route(model, name, readers, watched, owners.get(name), routes)
    for name in touched & owners.keys():
        layer = owners[name].layer.name
        if layer not in routes.layers and not owners[name].role:
            how = watched.others.get(name, "a product")
            routes.read[layer] = f"code outside of it reads its weight ({how})"
    return routes


def _route(
    model: nn.Module, name: str, readers: list[str], watched: Watched, owner: Site | None, routes: Routes
) -> None:
    """Add the route of one parameter if all products read it alike."""
    uses = {use for reader in readers for use in watched.products[name, reader]}
    layouts = {part.is_stored_in_out for part, _ in uses}
    if len(layouts) != 1:
        return
    layer: Layer | None = None
    parameter, is_transposed = model.get_parameter(name), layouts.pop()
    if owner is not None:
        is_same = type(owner.layer) is LinearLayer and owner.layer.transposed == is_transposed and not owner.role
        layer = owner.layer if is_same else None
    elif readers == [name.rpartition(".")[0]]:
        has_bias = parameter.dim() == 2 and all(with_bias for _, with_bias in uses)
        layer = _new_layer(name, parameter, has_bias, is_transposed)
        site = Site(layer, readers[0], name.rpartition(".")[2], name)
        routes.found.append(FoundSite(site, frozenset({id(parameter)})))
    if layer is None:
        return
    for reader in readers:
        routes.by_module.setdefault(reader, {})[name] = layer.name
        if reader in watched.composed or any(part.index is not None for part, _ in watched.products[name, reader]):
            routes.untraced.add(reader)


def _new_layer(name: str, parameter: Tensor, has_bias: bool, is_transposed: bool) -> LinearLayer:
    make = LinearLayer if parameter.dim() == 2 else StackedLinearLayer
    return make(name, tuple(parameter.shape), has_bias, is_transposed)


def _keeps_forward(model: nn.Module, reader: str, generated: frozenset[str]) -> bool:
    """Return whether a module runs its class's own forward, which can be put into the router."""
    return reader not in generated and forward_slot(model.get_submodule(reader)) is not None


def _is_inside(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")
