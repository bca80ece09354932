"""The graph of a finalized model, and its layers as deployed -> the steps of a program."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx
from torch.utils import _pytree as pytree

from nmcompile.errors import ConfigError, ExportError
from nmcompile.runtime.builder import Builder
from nmcompile.runtime.fuse import fuse
from nmcompile.runtime.layers import RuntimeLayer
from nmcompile.runtime.lower_layers import LayerLowering
from nmcompile.runtime.operators import lower_operator
from nmcompile.runtime.steps import Image, Step, Sums, Value
from nmcompile.runtime.trace import Graph, shape_of


@dataclass(frozen=True)
class Program:
    """A network as steps.

    Args:
        steps: in order.
        inputs: what the leaves of (args, kwargs) become, in order.
        outputs: the leaves of the result: values, or constants.
        takes, returns: the structures of (args, kwargs) and of the result.
    """

    steps: tuple[Step, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[object, ...]
    takes: pytree.TreeSpec
    returns: pytree.TreeSpec

    @property
    def images(self) -> tuple[Image, ...]:
        """Return the images that own memory, in the order in which they are written."""
        return tuple(dict.fromkeys(step.written.memory for step in self.steps if isinstance(step.written, Image)))


def lower(graph: Graph, layers: Mapping[str, list[RuntimeLayer]]) -> Program:
    """Lower a graph.

    Args:
        graph: of the finalized model.
        layers: by the name of their weight.

    Raises:
        ExportError: a layer that the graph does not show as one call, or whose norm does not follow it.
        ConfigError: no layer has integers.
    """
    found = {node: layer for node in graph.graph.nodes if (layer := _layer_at(node, graph, layers)) is not None}
    _check_found({layer.name: layer for several in layers.values() for layer in several}, found)
    builder = Builder(found)
    builder.results.update(graph.constants)
    inputs = {node: Value(shape_of(node)) for node in graph.inputs}
    builder.results.update(inputs)
    lowering = LayerLowering(builder, graph.parameters)
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            builder.results[node] = graph.attribute(node)
        elif node in found:
            lowering.lower(node)
        elif node.op == "call_function" and node not in builder.results:
            builder.results[node] = lower_operator(builder, node)
    outputs = tuple(builder.floats(one) if isinstance(one, fx.Node) else one for one in graph.outputs)
    if not any(isinstance(step, Sums) for step in builder.steps):
        raise ConfigError(
            "no layer of the model multiplies integers, so a runtime would be the model itself; compile it with "
            'mode="inference"'
        )
    return Program(fuse(builder.steps), tuple(inputs.values()), outputs, graph.takes, graph.returns)


def _layer_at(node: fx.Node, graph: Graph, layers: Mapping[str, list[RuntimeLayer]]) -> RuntimeLayer | None:
    """Return the layer whose weight a call reads as its second argument."""
    weight = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
    name = graph.parameters.get(weight) if isinstance(weight, fx.Node) else None
    candidates = layers.get(name or "", [])
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    called = [layer for layer in candidates if paths and layer.deployed.module == paths[-1]]
    return called[0] if len(called) == 1 else None


def _check_found(layers: Mapping[str, RuntimeLayer], found: Mapping[fx.Node, RuntimeLayer]) -> None:
    """Raise for a layer that would lose what it does to its activations."""
    names = {layer.name for layer in found.values()}
    for name, layer in layers.items():
        if layer.changes_activations and name not in names:
            raise ExportError(
                f"layer {name!r}: no convolution or linear call in the traced graph reads its whole weight "
                f"{layer.deployed.weight.name!r}, so the runtime cannot put its input on a grid; leave the layer out "
                f"with CompileConfig(layers={{{name!r}: None}})"
            )
