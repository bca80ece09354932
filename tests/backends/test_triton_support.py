"""Parts of the Triton backend that work without Triton: refusals, layouts, and the reference underneath."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from nmcompile.backends.triton import TritonBackend
from nmcompile.backends.triton import operators as triton_operators
from nmcompile.backends.triton.layout import BlockLayout, block_layout, fast_dim
from nmcompile.backends.triton.support import tensor_runs
from nmcompile.config import Phase
from nmcompile.custom_op import operator_of
from nmcompile.ir import operations as ops
from nmcompile.ir.layers import LinearLayer
from nmcompile.ir.node_meta import KEY, NodeMeta
from nmcompile.ir.protocols import OTHER_KIND
from nmcompile.pruning import mvue, transposable_mask
from nmcompile.pruning.packed import Packed, unpack


def prune_node(*args: Any) -> fx.Node:
    """Return `prune(x, *args, key)` in a graph that returns it."""
    graph = fx.Graph()
    x, key = graph.placeholder("x"), graph.placeholder("key")
    node = graph.call_function(ops.prune, (x, *args, key))
    graph.output(node)
    node.meta[KEY] = NodeMeta("prune", LinearLayer("a", (8, 8), has_bias=False), Phase.UPDATE)
    return node


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_machines_without_a_device_have_a_reason() -> None:
    support = TritonBackend().available()
    assert not support.ok and ("Triton is not installed" in support.reason or "no CUDA device" in support.reason)


def test_the_interpreter_takes_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert not tensor_runs(torch.ones(4))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tensor_runs(torch.ones(4)) and "interpreter" in TritonBackend().available().reason


def test_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton" in TritonBackend().available().reason


def test_old_devices_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    assert "(7, 5)" in TritonBackend().available().reason


@pytest.mark.parametrize(
    ("operator", "pattern"),
    [("greedy", (4, 8)), ("greedy_by_value", (4, 8)), ("mvue", (3, 7)), ("mvue_approx", (2, 4))],
)
def test_takes_what_has_a_kernel(operator: str, pattern: tuple[int, int]) -> None:
    assert TritonBackend().supports(prune_node(operator, *pattern, "flat", 1)).ok


@pytest.mark.parametrize(
    ("operator", "pattern", "reason"),
    [("sdgp", (2, 4), "'sdgp'"), ("mvue", (4, 16), "16 elements"), ("mvue_approx", (2, 8), "takes 2:4, not 2:8")],
)
def test_refusals_have_reasons(operator: str, pattern: tuple[int, int], reason: str) -> None:
    support = TritonBackend().supports(prune_node(operator, *pattern, "flat", 1))
    assert not support.ok and reason in support.reason


def test_refuses_gemms() -> None:
    assert TritonBackend().supports(fx.Graph().call_function(ops.gemm_forward, ())) == OTHER_KIND


@pytest.mark.parametrize("axis", ["channels", "batch", "flat", "auto"])
def test_other_tensors_run_as_the_reference(axis: str) -> None:
    backend, key = TritonBackend(), torch.tensor(1)
    node = prune_node("mvue", 2, 4, axis, 1)
    x = torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last)
    backend.lower(node)
    expected = ops.prune(x, "mvue", 2, 4, axis, 1, key)
    module = fx.GraphModule({}, node.graph)
    torch.testing.assert_close(module(x, key), expected, rtol=0, atol=0)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, key), expected, rtol=0, atol=0)


def test_opcheck() -> None:
    x, key = torch.randn(16, 24), torch.tensor(2)
    torch.library.opcheck(operator_of(triton_operators.triton_prune), (x, "mvue", 2, 4, 0, key))
    for dim in (0, 1, -1, -2):
        torch.library.opcheck(operator_of(triton_operators.triton_prune_lines), (x, "mvue", 2, 4, dim, key))
        torch.library.opcheck(operator_of(triton_operators.triton_pack_lines), (x, "greedy", dim))
    torch.library.opcheck(operator_of(triton_operators.triton_prune_tiles), (x.t(),))


@pytest.mark.parametrize("dim", [0, 1])
def test_lines_run_along_the_dim(dim: int) -> None:
    x, key = torch.randn(16, 24), torch.tensor(3)
    pruned = mvue.prune(x, "2:4", dim, key)
    lines = triton_operators.triton_prune_lines(x, "mvue", 2, 4, dim, key)
    assert lines.is_contiguous() and lines.equal(pruned.t() if dim == 0 else pruned)
    assert unpack(Packed(*triton_operators.triton_pack_lines(x, "mvue", dim, key)), 1).equal(lines)


def test_tiles_come_in_both_orientations() -> None:
    w = torch.randn(10, 14)
    pruned, transposed, mask = triton_operators.triton_prune_tiles(w)
    assert mask.equal(transposable_mask(w, "2:4"))
    assert pruned.equal(w * mask) and transposed.equal(pruned.t()) and transposed.is_contiguous()


def test_contiguous_blocks_are_one_dim() -> None:
    x = torch.empty(3, 5, 16)
    assert block_layout(x, x, 2, 4) == BlockLayout((60,), (4,), (4,), 1, 1, -1, 16)


def test_strided_axes_keep_what_lies_inside_apart() -> None:
    x = torch.empty(3, 16, 5, 7)
    assert block_layout(x, x, 1, 4) == BlockLayout((12, 35), (140, 1), (140, 1), 35, 35, -1, 16)


def test_partial_blocks_keep_their_dim() -> None:
    x = torch.empty(3, 5, 18)
    assert block_layout(x, x, 2, 4) == BlockLayout((15, 5), (18, 4), (18, 4), 1, 1, 1, 18)


def test_dims_merge_only_where_both_tensors_allow_it() -> None:
    x, out = torch.empty(8, 6), torch.empty(6, 8).t()
    assert block_layout(x, out, 0, 4) == BlockLayout((2, 6), (24, 1), (4, 8), 6, 1, -1, 8)


IMAGE = torch.empty(8, 32, 5, 3)
LAST = IMAGE.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("x", "dim", "fast"),
    [
        (LAST, 0, 1),
        (LAST, 1, 1),
        (LAST.transpose(0, 1).flatten(1), 1, 0),
        (torch.empty(6, 9, 32).movedim(-1, 1), 0, 1),
        (torch.empty(6, 9, 32).movedim(-1, 1), 2, 1),
        (IMAGE, 0, None),  # numbers and memory have one order
        (IMAGE, 1, None),
        (torch.empty(64, 48), 0, None),
        (torch.empty(8, 5, 3, 12).movedim(-1, 1), 0, None),  # twelve channels are less than one access brings
        (torch.empty(8, 5, 3, 64)[..., ::2].movedim(-1, 1), 0, None),  # no neighbours anywhere
    ],
)
def test_kernels_walk_along_memory_where_it_has_another_order_than_the_numbers(
    x: Tensor, dim: int, fast: int | None
) -> None:
    assert fast_dim(block_layout(x, x, dim, 4), 4) == fast


def test_tensors_of_two_orders_are_walked_along_the_numbers() -> None:
    assert fast_dim(block_layout(LAST, torch.empty_like(IMAGE), 0, 4), 4) is None
