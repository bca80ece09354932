"""The native MVUE kernel against the reference operator: equal bit for bit, draw for draw."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from nmcompile.backends.cpu import CpuBackend
from nmcompile.backends.cpu.backend import prune_mvue
from nmcompile.backends.cpu.kernels import cpu_mvue, kernel_support
from nmcompile.errors import ConfigError, OperandError
from nmcompile.ir import operations as ops
from nmcompile.pruning import draw_key, mvue

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)

BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
DTYPES = sorted(BITS, key=str)
PATTERNS = ["1:2", "2:4", "4:8", "3:7", "1:3", "5:8", "7:8", "2:16", "31:32"]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "sliced": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "rows": lambda x: torch.cat([x, x], dim=0)[: x.shape[0]],
    "expanded": lambda x: x[:1].expand(x.shape),
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0]


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal strides and bits; of a NaN only that it is one, since a conversion may change the others."""
    assert actual.stride() == expected.stride()
    assert actual.isnan().equal(expected.isnan())
    bits = BITS[expected.dtype]
    assert (
        actual.nan_to_num(0.0, torch.inf, -torch.inf)
        .view(bits)
        .equal(expected.nan_to_num(0.0, torch.inf, -torch.inf).view(bits))
    )


def values(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of a kind: `normal`, `ties`, `wide` (over the whole range of exponents), `special` or `sparse`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "ties":
        x = torch.randint(-2, 3, shape, generator=generator).double()
    if kind == "wide":
        x *= torch.exp2(torch.randint(-150, 129, shape, generator=generator).double())
    if kind == "sparse":
        x *= torch.rand(shape, generator=generator) < 0.4
    if kind == "special":
        numbers = torch.tensor(SPECIAL, dtype=torch.float64)
        chosen = numbers[torch.randint(0, len(SPECIAL), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < 0.2, chosen, x)
    return x.to(dtype)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 20) | st.just(33), min_size=1, max_size=4).map(tuple),
    st.sampled_from(["normal", "ties", "wide", "sparse", "special"]),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(PATTERNS),
    st.integers(-(2**63), 2**63 - 1),
    st.data(),
)
def test_equals_the_reference(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype, layout: str, pattern: str, key: int, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = values(shape, kind, dtype, seed=key % 2**32)
    x = LAYOUTS[layout](x) if x.numel() else x
    before = x.clone()
    n_keep, block = map(int, pattern.split(":"))
    assert_same_bits(cpu_mvue(x, n_keep, block, dim, torch.tensor(key)), mvue.prune(x, pattern, dim, torch.tensor(key)))
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "3:7"])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_equals_the_reference_on_a_large_tensor(dtype: torch.dtype, pattern: str, dim: int) -> None:
    """Large enough for two threads, for counters of all kinds and for thresholds that rounding moves."""
    x = values((96, 24, 7, 9), "normal", dtype, seed=1)
    x = x.to(memory_format=torch.channels_last) if dim == 1 else x
    n_keep, block = map(int, pattern.split(":"))
    key = draw_key(torch.Generator().manual_seed(2))
    assert_same_bits(cpu_mvue(x, n_keep, block, dim, key), mvue.prune(x, pattern, dim, key))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_equals_the_reference_on_every_half_precision_value(dtype: torch.dtype) -> None:
    words = torch.randperm(2**16, generator=torch.Generator().manual_seed(3))
    x = (words - 2**15).to(torch.int16).view(dtype).view(-1, 16)
    key = torch.tensor(4)
    assert_same_bits(cpu_mvue(x, 2, 4, -1, key), mvue.prune(x, "2:4", -1, key))


def test_equals_the_reference_where_rounding_moves_a_threshold() -> None:
    """Magnitudes of about one size, whose running sums end below S or meet in one element for some draws."""
    x = 1 + torch.rand(200_000, 8, generator=torch.Generator().manual_seed(5)).mul(4).round() * 2.0**-23
    for n_keep in (3, 7):
        key = torch.tensor(n_keep)
        assert_same_bits(cpu_mvue(x, n_keep, 8, -1, key), mvue.prune(x, f"{n_keep}:8", -1, key))


def test_equals_the_reference_with_any_number_of_threads() -> None:
    x, key = values((512, 512), "normal", torch.float32, seed=6), torch.tensor(7)
    expected, threads = mvue.prune(x, "2:4", 0, key), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            assert_same_bits(cpu_mvue(x, 2, 4, 0, key), expected)
    finally:
        torch.set_num_threads(threads)


def test_negated_views_and_parameters_are_read_as_they_look() -> None:
    negated = torch.randn(8, 8, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    key = torch.tensor(8)
    assert_same_bits(cpu_mvue(negated, 2, 4, 0, key), mvue.prune(negated, "2:4", 0, key))
    parameter = torch.nn.Parameter(torch.randn(8, 8))
    with torch.no_grad():
        assert_same_bits(cpu_mvue(parameter, 2, 4, 0, key), mvue.prune(parameter, "2:4", 0, key))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(layout: str) -> None:
    x = torch.randn(4, 8, 3, 5)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    x = LAYOUTS["sliced"](x) if layout == "sliced" else x
    torch.library.opcheck(torch.ops.nmcompile.cpu_mvue.default, (x, 2, 4, 1, torch.tensor(9)))


def test_wrong_operands_get_the_reference_errors() -> None:
    x, key = torch.randn(4, 4), torch.tensor(0)
    with pytest.raises(ConfigError, match="4:4"):
        cpu_mvue(x, 4, 4, 0, key)
    with pytest.raises(OperandError, match="dim 2"):
        cpu_mvue(x, 2, 4, 2, key)
    with pytest.raises(OperandError, match=r"torch\.int32"):
        cpu_mvue(x.int(), 2, 4, 0, key)
    with pytest.raises(OperandError, match="0-d int64 key"):
        cpu_mvue(x, 2, 4, 0, torch.zeros(2, dtype=torch.int64))


def test_larger_blocks_run_as_the_reference() -> None:
    x, key = torch.randn(3, 100), torch.tensor(10)
    assert_same_bits(cpu_mvue(x, 7, 50, -1, key), mvue.prune(x, "7:50", -1, key))


def test_the_module_refuses_what_would_leave_its_buffers() -> None:
    from nmcompile import _kernels

    x = torch.randn(4, 4)
    for out, dim, n_keep, block in [
        (torch.empty(4, 3), 0, 2, 4),
        (torch.empty(4, 4, dtype=torch.float64), 0, 2, 4),
        (torch.empty(4, 4), 2, 2, 4),
        (torch.empty(4, 4), 0, 0, 4),
        (torch.empty(4, 4), 0, 4, 4),
        (torch.empty(4, 4), 0, 2, 33),
    ]:
        with pytest.raises(ValueError):
            _kernels.mvue(x, out, dim, n_keep, block, 0, 1)


def prune_node(*args: Any) -> fx.Node:
    """`prune(x, *args, key)` in a graph that returns it."""
    graph = fx.Graph()
    x, key = graph.placeholder("x"), graph.placeholder("key")
    node = graph.call_function(ops.prune, (x, *args, key))
    graph.output(node)
    node.meta["kind"] = "prune"
    return node


@pytest.mark.parametrize("axis", ["channels", "batch", "flat", "auto"])
@pytest.mark.parametrize(("shape", "channel_dim"), [((8, 6, 3, 3), 1), ((2, 6, 8), -1), ((5, 7), -1)])
def test_lowered_nodes_compute_the_same(axis: str, shape: tuple[int, ...], channel_dim: int) -> None:
    backend, key = CpuBackend(), torch.tensor(11)
    node = prune_node("mvue", 2, 4, axis, channel_dim)
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    expected = ops.prune(x, "mvue", 2, 4, axis, channel_dim, key)
    assert backend.supports(node).ok
    backend.lower(node)
    assert node.target is prune_mvue and node.meta["kind"] == "prune"
    module = fx.GraphModule({}, node.graph)
    assert_same_bits(module(x, key), expected)
    assert_same_bits(copy.deepcopy(module)(x, key), expected)
    assert_same_bits(torch.compile(module, backend="aot_eager", fullgraph=True)(x, key), expected)


def test_refusals_have_reasons() -> None:
    backend = CpuBackend()
    assert "'greedy'" in backend.supports(prune_node("greedy", 2, 4, "flat", 1)).reason
    assert "64" in backend.supports(prune_node("mvue", 2, 64, "flat", 1)).reason
    graph = fx.Graph()
    assert not backend.supports(graph.call_function(ops.gemm_forward, ())).ok
    assert backend.available() == kernel_support()
