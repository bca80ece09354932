"""A graph of torch.compile as a model: Dynamo passes parameters as inputs, here they are attributes again."""

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from torch import fx, nn
from torch._ops import HigherOrderOperator

from nmcompile.capture.names import join
from nmcompile.errors import CaptureError
from nmcompile.ir.calls import match_call
from nmcompile.ir.captured import Site

STEPS = re.compile(r"\['([^']*)'\]|\.(\w+)|\[(\d+)\]")
"""One step of a path such as `L['self']._modules['fc']._parameters['weight']`."""
TABLES = ("_modules", "_parameters", "_buffers")
WRAPPERS = ("torch", "nmcompile", "contextlib", "functools", "accelerate")
"""Packages whose code may stand between torch.compile's wrapper and the outermost frame that it compiles."""


@dataclass(frozen=True)
class Part:
    """A graph that Dynamo made: that of a frame, or one that an operator such as activation checkpointing calls.

    Args:
        graph: as Dynamo made it.
        paths: the names of the parameters that arrive, by the name of the placeholder.
    """

    graph: fx.Graph
    paths: Mapping[str, str]

    def as_function(self, trace: fx.Graph) -> fx.Graph:
        """Return a graph that was traced from the model, with this part's inputs again in place of the attributes."""
        result, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        inputs = {node.name: result.node_copy(node) for node in self.graph.find_nodes(op="placeholder")}
        arriving = {path: inputs[name] for name, path in self.paths.items()}
        for node in trace.nodes:
            if node.op == "placeholder":
                copies[node] = inputs[node.name]
            elif node.op == "get_attr" and node.target in arriving:
                copies[node] = arriving[str(node.target)]
            else:
                copies[node] = result.node_copy(node, copies.__getitem__)
        return result

    def positions(self, site: Site) -> int | None:
        """Return the output positions of a layer; None if its shape is open."""
        shapes = (node.meta["example_value"].shape for node in self.graph.nodes if node.name == site.role)
        sizes = next(shapes)
        return math.prod(sizes) // max(1, site.layer.out_features) if all(type(one) is int for one in sizes) else None


@dataclass(frozen=True)
class DynamoGraph:
    """A graph that Dynamo made, as a model.

    Args:
        model: the same graph, with its parameters as attributes.
        parts: by the name of the module in `model`, `""` for the root.
        names: the parameters by id, with their names relative to the frame's own module.
        is_whole: whether the graph is all of the model, and not a part between graph breaks.
    """

    model: fx.GraphModule
    parts: Mapping[str, Part]
    names: Mapping[int, str]
    is_whole: bool


def as_model(gm: fx.GraphModule, inputs: Sequence[object], sources: Mapping[str, str], is_whole: bool) -> DynamoGraph:
    """Return Dynamo's graph with the given parameters as its attributes.

    Args:
        gm: as a backend of torch.compile gets it.
        inputs: values of its placeholders.
        sources: what `sources_of` has returned for it.
        is_whole: what `is_whole_model` has returned for it.

    Raises:
        CaptureError: a layer inside of an operator such as `cond`, which hides its weights.
    """
    holder, paths, names = nn.Module(), dict[str, str](), dict[int, str]()
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if isinstance(value, nn.Parameter):
            if id(value) not in names:
                names[id(value)] = _put(holder, sources[node.name], value)
            paths[node.name] = names[id(value)]
    parts = dict[str, Part]()
    model = _with_attributes(gm, holder, paths, "", parts)
    return DynamoGraph(model, parts, names, is_whole)


def sources_of(gm: fx.GraphModule) -> dict[str, str]:
    """Return the names of a graph's inputs in the module whose code was traced, while Dynamo still tells them."""
    return {node.name: _path(node) for node in gm.graph.find_nodes(op="placeholder")}


def is_whole_model(gm: fx.GraphModule) -> bool:
    """Return whether a graph that is being compiled is all of the model, and not a part between graph breaks."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return not getattr(reason, "graph_break", False) and _is_outermost()


def _path(node: fx.Node) -> str:
    """Return the name of a placeholder's parameter in the module whose code was traced."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "") if source is not None else ""
    steps = [next(filter(None, step)) for step in STEPS.findall(name if isinstance(name, str) else "")]
    path = [step.replace(".", "_") for step in steps if step not in TABLES]
    return ".".join(path[1:] or path) or node.name


def _put(holder: nn.Module, path: str, parameter: nn.Parameter) -> str:
    """Register a parameter under its path, or under one that is free, and return that."""
    *folders, attribute = path.split(".")
    module = holder
    for folder in folders:
        if folder not in module._modules:
            if hasattr(module, folder):
                return _put(holder, "_".join((*folders, attribute)), parameter)
            module.add_module(folder, nn.Module())
        module = module.get_submodule(folder)
    if hasattr(module, attribute):
        return _put(holder, f"{path}_", parameter)
    module.register_parameter(attribute, parameter)
    return path


def _with_attributes(
    gm: fx.GraphModule, holder: nn.Module, paths: Mapping[str, str], name: str, parts: dict[str, Part]
) -> fx.GraphModule:
    """Return a copy of a graph module that reads the placeholders in `paths` from a module's attributes."""
    parts[name] = Part(gm.graph, paths)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in gm.graph.nodes:
        if node.name in paths and node.op == "placeholder":
            copies[node] = graph.create_node("get_attr", paths[node.name], name=node.name)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    bodies = dict(_bodies(gm, paths))
    for target in {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}:
        found = getattr(gm, target)
        if target in bodies:
            tree = _same_tree(holder, bodies[target])
            found = _with_attributes(found, tree, bodies[target], join(name, target), parts)
        setattr(holder, target, found)
    return fx.GraphModule(holder, graph)


def _bodies(gm: fx.GraphModule, paths: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the graphs that operators such as activation checkpointing call, with the paths of their parameters."""
    for node in gm.graph.nodes:
        if not isinstance(node.target, HigherOrderOperator):
            continue
        held = [one for one in node.all_input_nodes if one.op == "get_attr"]
        bodies = [one for one in held if isinstance(_of(gm, one), fx.GraphModule)]
        for body in bodies:
            graph = _of(gm, body).graph
            inside = dict[str, str]()
            if node.args[:1] == (body,) and len(bodies) == 1:
                pairs = zip(graph.find_nodes(op="placeholder"), node.args[1:], strict=False)
                inside = {one.name: paths[given.name] for one, given in pairs if getattr(given, "name", None) in paths}
            _check_weights(graph, inside, str(node.target))
            yield str(body.target), inside


def _of(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    found: fx.GraphModule = getattr(gm, str(node.target))
    return found


def _check_weights(graph: fx.Graph, paths: dict[str, str], operator: str) -> None:
    """Raise if a layer of a called graph has a weight that is not one of the known parameters."""
    for call in filter(None, map(match_call, graph.nodes)):
        weight = call.weight
        if isinstance(weight, fx.Node) and weight.op == "placeholder" and weight.name not in paths:
            raise CaptureError(
                f"{call.label} ({call.node.name}) is called inside of {operator}, which hides its weight; compile the "
                "model with nmcompile.compile, and the result with torch.compile(backend='inductor')"
            )


def _same_tree(holder: nn.Module, paths: dict[str, str]) -> nn.Module:
    """Return a new tree with the parameters at these paths."""
    tree = nn.Module()
    for path in sorted(set(paths.values())):
        _put(tree, path, holder.get_parameter(path))
    return tree


def _is_outermost() -> bool:
    """Return whether torch.compile's own wrapper calls the frame that Dynamo compiles now.

    Otherwise other code does, in a model whose graph is broken: the frame is a part of the model, or a part's rest.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return True
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in WRAPPERS:
            return False
        frame = frame.f_back
    return True
