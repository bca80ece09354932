"""Graphs that torch.compile makes of a compiled model are ones that CUDA graphs can record, as far as no GPU is needed.

A recorded graph runs no Python and waits for nothing. So nothing in it may live on the CPU, synchronize, or write a
tensor whose address may change.
"""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.three_gemm import draw_stream
from nmcompile.training import masks
from tests.graph_census import Graphs, check_recordable, graphs_of, inputs_of, written

MODES = "weights", "t-weights", "training"
X = torch.randn(8, 4, 5, 5)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(mode: str, backend: str = "auto") -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 8))
    return nmcompile.compile(net, mode, backend=backend, config=CompileConfig(ends="sparse"))


@cache
def graphs_in(mode: str, backend: str = "auto") -> Graphs:
    return graphs_of(compiled(mode, backend), X)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("mode", MODES)
def test_cuda_graphs_can_record_both_graphs(mode: str, backend: str) -> None:
    check_recordable(graphs_in(mode, backend))


@pytest.mark.parametrize("mode", MODES)
def test_only_statistics_and_the_counts_of_draws_are_written(mode: str) -> None:
    graphs = graphs_in(mode)
    statistics = written(graphs.forward)
    assert len(statistics) == len(list(nn.BatchNorm2d(8).buffers())) and statistics.keys() <= set(graphs.static)
    counts = [(x.dtype, x.dim()) for x in written(graphs.backward).values()]
    assert counts == ([(torch.int64, 0)] * 2 if mode == "training" else [])


def test_memory_that_stays_is_made_while_a_step_is_compiled() -> None:
    """Memory that backward makes belongs to the CUDA graph, which torch refuses if it stays."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = nmcompile.compile(net, "training", config=CompileConfig(ends="sparse"))
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(8, 8))
    made = draw_stream._bases_of_rank.cache_info().misses
    output.sum().backward()
    assert draw_stream._bases_of_rank.cache_info().misses == made


def test_every_input_but_the_batch_stays_where_it_is() -> None:
    """Others would be copied before each replay."""
    graphs = graphs_in("training")
    inputs = inputs_of(graphs.forward)
    (batch,) = set(range(len(inputs))) - set(graphs.static)
    assert inputs[batch].shape == X.shape


def test_the_operator_that_rebuilds_masks_would_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs hold it if torch cannot guard on objects; the census sees it."""
    monkeypatch.setattr(masks, "guards_of", lambda _: None)
    graphs = graphs_of(compiled("t-weights"), X)
    clocks = [x for x in written(graphs.forward).values() if x.dtype == torch.int64 and x.dim() == 1]
    assert len(clocks) == 2
