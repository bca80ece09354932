"""The graphs that torch.compile makes of a training step, and what CUDA graphs ask of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.cudagraphs import check_for_skip, find_input_mutations
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.utils import count_tangents
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.cudagraph_unsafe}
"""Tags of operators that wait for the device, or that CUDA graphs refuse."""


@dataclass
class Graphs:
    """The forward and the backward graph of a step, and which inputs of the forward graph stay where they are."""

    forward: fx.GraphModule = field(init=False)
    backward: fx.GraphModule = field(init=False)
    static: Sequence[int] = field(init=False)

    def take_forward(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., object]:
        context = torch._guards.TracingContext.get()
        assert context.fw_metadata is not None
        self.forward, self.static = graph, context.fw_metadata.static_input_indices
        return make_boxed_func(graph)

    def take_backward(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., object]:
        self.backward = graph
        return make_boxed_func(graph)


def graphs_of(model: nn.Module, x: Tensor) -> Graphs:
    graphs = Graphs()
    keep = aot_autograd(
        fw_compiler=graphs.take_forward,
        bw_compiler=graphs.take_backward,
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )
    torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(x).sum().backward()
    return graphs


def check_recordable(graphs: Graphs) -> None:
    """Check both graphs by torch's own rules, with inputs on a GPU, none of which has to be there."""
    for graph, fixed in (graphs.forward, len(graphs.static)), (graphs.backward, count_tangents(graphs.backward)):
        put_on_cuda(graph)
        assert devices(graph) == {"cuda"} and not waiting(graph)
        assert check_for_skip(graph, fixed) is None


def put_on_cuda(graph: fx.GraphModule) -> None:
    """Replace the values in the metadata of a graph by those that it has for inputs on a GPU."""
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in inputs_of(graph)]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)


def inputs_of(graph: fx.GraphModule) -> list[Tensor]:
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


def devices(graph: fx.GraphModule) -> set[str]:
    values = torch.utils._pytree.tree_leaves([node.meta.get("val") for node in graph.graph.nodes])
    return {x.device.type for x in values if isinstance(x, Tensor)}


def waiting(graph: fx.GraphModule) -> list[str]:
    called = {node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return [str(operator) for operator in called if WAITING & set(operator.tags)]


def written(graph: fx.GraphModule) -> dict[int, Tensor]:
    """Return the inputs that a graph writes, by number."""
    inputs = inputs_of(graph)
    return {index: inputs[index] for index in sorted(find_input_mutations(graph.graph))}
