"""Graphs that torch.compile makes of a compiled model are ones that CUDA graphs can record, as far as no GPU is needed.

A recorded graph runs no Python and waits for nothing. So nothing in it may live on the CPU, synchronize, or write a
tensor whose address may change.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.cudagraphs import check_for_skip, find_input_mutations
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.utils import count_tangents
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import nmcompile
from nmcompile import CompileConfig
from nmcompile.three_gemm import draw_stream
from nmcompile.training import masks

MODES = "weights", "t-weights", "training"
WAITING = {
    torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.cudagraph_unsafe,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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


@cache
def graphs_of(mode: str, backend: str) -> Graphs:
    return captured(mode, backend)


def captured(mode: str, backend: str) -> Graphs:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 8))
    model, graphs = nmcompile.compile(net, mode, backend=backend, config=CompileConfig(ends="sparse")), Graphs()
    keep = aot_autograd(
        fw_compiler=graphs.take_forward,
        bw_compiler=graphs.take_backward,
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )
    torch.compile(model, backend=keep, fullgraph=True)(torch.randn(8, 4, 5, 5)).sum().backward()
    return graphs


def put_on_cuda(graph: fx.GraphModule) -> None:
    """Replace the values in the metadata of a graph by those that it has for inputs on a GPU."""
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in values]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)


def devices(graph: fx.GraphModule) -> set[str]:
    values = torch.utils._pytree.tree_leaves([node.meta.get("val") for node in graph.graph.nodes])
    return {x.device.type for x in values if isinstance(x, Tensor)}


def waiting(graph: fx.GraphModule) -> list[str]:
    """Return the operators that wait for the device, or are refused by CUDA graphs."""
    called = {node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return [str(operator) for operator in called if WAITING & set(operator.tags)]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("mode", MODES)
def test_cuda_graphs_can_record_both_graphs(mode: str, backend: str) -> None:
    graphs = graphs_of(mode, backend)
    batch_norm = 3  # buffers, which keep their addresses
    for graph, fixed in (graphs.forward, len(graphs.static)), (graphs.backward, count_tangents(graphs.backward)):
        put_on_cuda(graph)
        assert devices(graph) == {"cuda"} and not waiting(graph)
        assert check_for_skip(graph, fixed) is None
    written = find_input_mutations(graphs.forward.graph)
    assert len(written) == batch_norm and written <= set(graphs.static)


@pytest.mark.parametrize("mode", MODES)
def test_only_the_counts_of_draws_are_written_in_backward(mode: str) -> None:
    graphs = graphs_of(mode, "auto")
    inputs = [node.meta["val"] for node in graphs.backward.graph.nodes if node.op == "placeholder"]
    written = [inputs[index] for index in find_input_mutations(graphs.backward.graph)]
    assert [(x.dtype, x.dim()) for x in written] == ([(torch.int64, 0)] * 2 if mode == "training" else [])


def test_memory_that_stays_is_made_while_a_step_is_compiled() -> None:
    """Memory that backward makes belongs to the CUDA graph, which torch refuses if it stays."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = nmcompile.compile(net, "training", config=CompileConfig(ends="sparse"))
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(8, 8))
    made = draw_stream._on_device.cache_info().misses
    output.sum().backward()
    assert draw_stream._on_device.cache_info().misses == made


def test_every_input_but_the_batch_stays_where_it_is() -> None:
    """Others would be copied before each replay."""
    graphs = graphs_of("training", "auto")
    inputs = [node for node in graphs.forward.graph.nodes if node.op == "placeholder"]
    (batch,) = set(range(len(inputs))) - set(graphs.static)
    assert inputs[batch].meta["val"].shape == (8, 4, 5, 5)


def test_the_operator_that_rebuilds_masks_would_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs hold it if torch cannot guard on objects; the census sees it."""
    monkeypatch.setattr(masks, "guards_of", lambda _: None)
    graphs = captured("t-weights", "auto")
    assert any("refresh_mask" in str(node) or "refresh_mask" in str(node.args) for node in graphs.forward.graph.nodes)
    assert len(find_input_mutations(graphs.forward.graph)) > 3
