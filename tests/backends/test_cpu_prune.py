"""The native pruning kernels against the reference operators: equal bit for bit, draw for draw."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from nmcompile.backends.cpu import CpuBackend
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.prune import WORD, cpu_prune, cpu_prune_mask, cpu_prune_out, prune_natively
from nmcompile.backends.cpu.prune_packed import cpu_prune_packed, cpu_prune_packed_out
from nmcompile.config import Phase
from nmcompile.custom_op import operator_of
from nmcompile.errors import ConfigError, OperandError
from nmcompile.ir import operations as ops
from nmcompile.ir.layers import LinearLayer
from nmcompile.ir.node_meta import KEY, NodeMeta, meta_of
from nmcompile.ir.protocols import OTHER_KIND
from nmcompile.native import INSTRUCTION_SETS, kernels
from nmcompile.pruning import OPERATORS, draw_key, mvue
from nmcompile.pruning.packed import Packed, pack, two_of_four, unpack
from tests.backends.operands import LAYOUTS, values

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)

BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
DTYPES = sorted(BITS, key=str)
PATTERNS = ["1:2", "2:4", "4:8", "3:7", "1:3", "5:8", "7:8", "2:16", "31:32"]
OPERATOR_NAMES = ["mvue", "mvue_approx", "greedy", "greedy_by_value"]


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Check for equal strides and bits; a NaN need only be a NaN, as a conversion may change its other bits."""
    assert actual.stride() == expected.stride()
    assert actual.isnan().equal(expected.isnan())
    bits = BITS[expected.dtype]
    assert (
        actual.nan_to_num(0.0, torch.inf, -torch.inf)
        .view(bits)
        .equal(expected.nan_to_num(0.0, torch.inf, -torch.inf).view(bits))
    )


def key_of(operator: str, seed: int) -> Tensor | None:
    return torch.tensor(seed) if OPERATORS[operator].needs_key else None


def expected_result(x: Tensor, operator: str, pattern: str, dim: int, key: Tensor | None, relu: bool) -> Tensor:
    """Return the reference's result, with the strides of `torch.empty_like(x)`."""
    result = OPERATORS[operator].prune(torch.relu(x) if relu else x, pattern, dim, key)
    return torch.empty_like(x).copy_(result)


def run_kernel(
    x: Tensor,
    operator: str,
    pattern: str,
    dim: int,
    key: Tensor | None,
    relu: bool,
    like: Packed | Tensor,
    isa: str,
    threads: int = 1,
) -> Packed | Tensor:
    """Run the kernel on outputs with the strides of `like` that are filled with other values."""
    n_keep, block = map(int, pattern.split(":"))
    outputs = [torch.empty_like(one).copy_(one == 0) for one in (like if isinstance(like, Packed) else (like,))]
    indices = outputs[1] if isinstance(like, Packed) else None
    word = 0 if key is None else int(key) & WORD
    kernels.prune(operator, x, outputs[0], indices, dim % x.dim(), n_keep, block, relu, word, isa, threads)
    return Packed(*outputs) if isinstance(like, Packed) else outputs[0]


def packed_by_reference(pruned: Tensor, dim: int) -> Packed:
    return pack(pruned, two_of_four(pruned, dim), dim)


def assert_same(actual: Packed | Tensor, expected: Packed | Tensor) -> None:
    if isinstance(actual, Packed) and isinstance(expected, Packed):
        assert actual.values.shape == expected.values.shape
        assert_same_bits(actual.values.flatten(), expected.values.flatten())
        assert actual.indices.equal(expected.indices)
    else:
        assert isinstance(actual, Tensor) and isinstance(expected, Tensor)
        assert_same_bits(actual, expected)


SHAPES = st.lists(st.integers(0, 20) | st.sampled_from([33, 64, 130]), min_size=1, max_size=4).map(tuple)
KINDS = st.sampled_from(["normal", "ties", "wide", "sparse", "special"])


@settings(deadline=None, max_examples=300)
@given(
    SHAPES.filter(lambda shape: torch.Size(shape).numel() < 50_000),
    KINDS,
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(OPERATOR_NAMES),
    st.sampled_from(PATTERNS),
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
    st.data(),
)
def test_equals_the_reference(
    shape: tuple[int, ...],
    kind: str,
    dtype: torch.dtype,
    layout: str,
    operator: str,
    pattern: str,
    seed: int,
    relu: bool,
    data: st.DataObject,
) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    pattern = "2:4" if operator == "mvue_approx" else pattern
    relu, key = relu and operator.startswith("greedy"), key_of(operator, seed)
    x = values(shape, kind, dtype, seed=seed % 2**32)
    x = LAYOUTS[layout](x) if x.numel() else x
    before = x.clone()
    expected = expected_result(x, operator, pattern, dim, key, relu)
    n_keep, block = map(int, pattern.split(":"))
    assert_same_bits(cpu_prune(x, operator, n_keep, block, dim, key, relu), expected)
    for isa in INSTRUCTION_SETS:
        assert_same(run_kernel(x, operator, pattern, dim, key, relu, expected, isa), expected)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


@settings(deadline=None, max_examples=200)
@given(
    SHAPES.filter(lambda shape: torch.Size(shape).numel() < 50_000),
    KINDS,
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(["greedy", "greedy_by_value"]),
    st.sampled_from(PATTERNS),
    st.data(),
)
def test_masks_equal_those_of_the_reference(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype, layout: str, operator: str, pattern: str, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = values(shape, kind, dtype, seed=data.draw(st.integers(0, 2**32 - 1)))
    x = LAYOUTS[layout](x) if x.numel() else x
    expected = OPERATORS[operator].mask(x, pattern, dim)
    n_keep, block = map(int, pattern.split(":"))
    found = cpu_prune_mask(x, operator, n_keep, block, dim)
    assert found.equal(expected) and found.stride() == expected.stride()
    for isa in INSTRUCTION_SETS:
        written = ~expected
        kernels.prune(operator, x, written, None, dim % x.dim(), n_keep, block, False, 0, isa, 1)
        assert written.view(torch.uint8).equal(expected.view(torch.uint8))


@pytest.mark.parametrize(("operator", "relu"), [("mvue", False), ("greedy", True)])
def test_the_kernel_refuses_masks_that_no_operator_has(operator: str, relu: bool) -> None:
    x = torch.randn(8, 8)
    with pytest.raises(ValueError, match="no kernel for this operator"):
        kernels.prune(operator, x, x > 0, None, 1, 2, 4, relu, 0, INSTRUCTION_SETS[0], 1)
    with pytest.raises(ConfigError, match="has no mask"):
        cpu_prune_mask(x, "mvue", 2, 4, 1)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 12) | st.just(33), min_size=1, max_size=3),
    st.integers(0, 40).map(lambda groups: 4 * groups),
    KINDS,
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(OPERATOR_NAMES),
    st.sampled_from(["1:2", "2:4"]),
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
    st.data(),
)
def test_packed_equals_the_reference(
    others: list[int],
    size: int,
    kind: str,
    dtype: torch.dtype,
    layout: str,
    operator: str,
    pattern: str,
    seed: int,
    relu: bool,
    data: st.DataObject,
) -> None:
    dim = data.draw(st.integers(0, len(others)))
    shape = (*others[:dim], size, *others[dim:])
    pattern = "2:4" if operator == "mvue_approx" else pattern
    relu, key = relu and operator.startswith("greedy"), key_of(operator, seed)
    x = values(shape, kind, dtype, seed=seed % 2**32)
    x = LAYOUTS[layout](x) if x.numel() else x
    pruned = expected_result(x, operator, pattern, dim, key, relu)
    expected = packed_by_reference(pruned, dim)
    n_keep, block = map(int, pattern.split(":"))
    assert_same(Packed(*cpu_prune_packed(x, operator, n_keep, block, dim, key, relu)), expected)
    for isa in INSTRUCTION_SETS:
        assert_same(run_kernel(x, operator, pattern, dim, key, relu, expected, isa), expected)
    torch.testing.assert_close(unpack(expected, dim), pruned.contiguous(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("operator", "pattern"),
    [("mvue", "1:2"), ("mvue", "2:4"), ("mvue", "4:8"), ("mvue", "3:7"), ("mvue_approx", "2:4"), ("greedy", "2:4")],
)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_equals_the_reference_on_a_large_tensor(dtype: torch.dtype, operator: str, pattern: str, dim: int) -> None:
    """Large enough for two threads, for counters of all kinds and for thresholds that rounding moves."""
    x = values((96, 24, 11, 13), "normal", dtype, seed=1)
    x = x.to(memory_format=torch.channels_last) if dim == 1 else x
    key = draw_key(torch.Generator().manual_seed(2)) if OPERATORS[operator].needs_key else None
    expected = expected_result(x, operator, pattern, dim, key, relu=False)
    for isa in INSTRUCTION_SETS:
        assert_same(run_kernel(x, operator, pattern, dim, key, False, expected, isa, threads=2), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_equals_the_reference_on_every_half_precision_value(dtype: torch.dtype, operator: str) -> None:
    words = torch.randperm(2**16, generator=torch.Generator().manual_seed(3))
    x = (words - 2**15).to(torch.int16).view(dtype).view(-1, 16)
    key, relu = key_of(operator, 4), operator.startswith("greedy")
    expected = expected_result(x, operator, "2:4", -1, key, relu)
    for isa in INSTRUCTION_SETS:
        assert_same(run_kernel(x, operator, "2:4", -1, key, relu, expected, isa), expected)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "3:8", "7:8"])
def test_equals_the_reference_where_rounding_moves_a_threshold(pattern: str) -> None:
    """Magnitudes are of about one size; for some draws their running sums end below S or meet in one element."""
    x = 1 + torch.rand(200_000, 8, generator=torch.Generator().manual_seed(5)).mul(4).round() * 2.0**-23
    x[::3] *= torch.tensor([1, 2.0**-24] * 4)  # sums that round to their largest element
    x[1::3] *= 2.0**-149  # a few units of the smallest number
    key = torch.tensor(6)
    expected = mvue.prune(x, pattern, -1, key)
    for isa in INSTRUCTION_SETS:
        assert_same(run_kernel(x, "mvue", pattern, -1, key, False, expected, isa), expected)


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize("dim", [0, 1])
def test_any_number_of_threads_gives_the_same_bits(operator: str, dim: int) -> None:
    x, key = values((1024, 512), "normal", torch.float32, seed=6), key_of(operator, 7)
    pruned = expected_result(x, operator, "2:4", dim, key, relu=False)
    wanted: list[Packed | Tensor] = [pruned, packed_by_reference(pruned, dim)]
    for like, isa, threads in product(wanted, INSTRUCTION_SETS, (1, 2, 4)):
        assert_same(run_kernel(x, operator, "2:4", dim, key, False, like, isa, threads), like)


@pytest.mark.parametrize("dim", [0, 1])
def test_streamed_output_is_the_same(dim: int) -> None:
    """From 8 MB on, outputs bypass the caches; vectors that are not aligned do not."""
    x, key = values((1028, 2052), "normal", torch.float32, seed=8), torch.tensor(9)
    for operand in (x, x[:, :-4], x[:, 1:-3]):
        expected = expected_result(operand, "mvue", "2:4", dim, key, relu=False)
        assert_same_bits(cpu_prune(operand, "mvue", 2, 4, dim, key), expected)


def test_negated_views_and_parameters_are_read_as_they_look() -> None:
    negated = torch.randn(8, 8, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    key = torch.tensor(8)
    assert_same_bits(cpu_prune(negated, "mvue", 2, 4, 0, key), mvue.prune(negated, "2:4", 0, key))
    assert_same_bits(cpu_prune(negated, "greedy", 2, 4, 0), OPERATORS["greedy"].prune(negated, "2:4", 0, None))
    parameter = torch.nn.Parameter(torch.randn(8, 8))
    with torch.no_grad():
        assert_same_bits(cpu_prune(parameter, "mvue", 2, 4, 0, key), mvue.prune(parameter, "2:4", 0, key))


def test_out_takes_any_strides_and_lets_nothing_else_through() -> None:
    x, key = torch.randn(8, 16), torch.tensor(10)
    expected = mvue.prune(x, "2:4", 1, key)
    out = torch.empty(16, 16)[:, ::2].t()
    cpu_prune_out(x, "mvue", 2, 4, 1, out, key)
    assert out.equal(expected)
    values, indices = torch.empty(16, 8)[::2], torch.empty(2, 8, dtype=torch.uint8).t()
    cpu_prune_packed_out(x, "mvue", 2, 4, 1, values, indices, key)
    assert unpack(Packed(values, indices), 1).equal(expected)
    for wrong in (torch.empty(8, 15), torch.empty(8, 16, dtype=torch.float64)):
        with pytest.raises(OperandError, match="out is"):
            cpu_prune_out(x, "mvue", 2, 4, 1, wrong, key)
    with pytest.raises(OperandError, match="indices is"):
        cpu_prune_packed_out(x, "mvue", 2, 4, 1, values, indices.int(), key)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_opcheck(layout: str, operator: str) -> None:
    x = torch.randn(4, 8, 3, 5)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    x = LAYOUTS["sliced"](x) if layout == "sliced" else x
    key = key_of(operator, 9)
    torch.library.opcheck(operator_of(cpu_prune), (x, operator, 2, 4, 1, key))
    torch.library.opcheck(operator_of(cpu_prune_out), (x, operator, 2, 4, 1, torch.empty_like(x), key))
    torch.library.opcheck(operator_of(cpu_prune_packed), (x, operator, 2, 4, 1, key))
    packed = [torch.empty(4, 4, 3, 5), torch.empty(4, 1, 3, 5, dtype=torch.uint8)]
    torch.library.opcheck(operator_of(cpu_prune_packed_out), (x, operator, 2, 4, 1, *packed, key))


def test_wrong_operands_get_the_reference_errors() -> None:
    x, key = torch.randn(4, 4), torch.tensor(0)
    with pytest.raises(ConfigError, match="4:4"):
        cpu_prune(x, "mvue", 4, 4, 0, key)
    with pytest.raises(ConfigError, match="takes 2:M"):
        cpu_prune(x, "mvue_approx", 1, 2, 0, key)
    with pytest.raises(OperandError, match="dim 2"):
        cpu_prune(x, "mvue", 2, 4, 2, key)
    with pytest.raises(OperandError, match=r"torch\.int32"):
        cpu_prune(x.int(), "mvue", 2, 4, 0, key)
    with pytest.raises(OperandError, match="0-d int64 key"):
        cpu_prune(x, "mvue", 2, 4, 0, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(OperandError, match="0-d int64 key"):
        cpu_prune(x, "mvue", 2, 4, 0)
    with pytest.raises(ConfigError, match="packed format"):
        cpu_prune_packed(x, "greedy", 1, 4, 0)
    with pytest.raises(OperandError, match="multiple of 4"):
        cpu_prune_packed(x[:3], "greedy", 2, 4, 0)


def test_what_has_no_kernel_runs_as_the_reference() -> None:
    x, key = torch.randn(3, 100), torch.tensor(10)
    assert_same_bits(cpu_prune(x, "mvue", 7, 50, -1, key), mvue.prune(x, "7:50", -1, key))
    assert_same_bits(cpu_prune(x, "uniform", 2, 4, -1, key), OPERATORS["uniform"].prune(x, "2:4", -1, key))
    pruned = mvue.prune(torch.relu(x), "2:4", -1, key)
    assert_same_bits(cpu_prune(x, "mvue", 2, 4, -1, key, True), pruned)
    assert_same(Packed(*cpu_prune_packed(x, "mvue", 2, 4, -1, key, True)), packed_by_reference(pruned, -1))


def test_the_module_refuses_what_would_leave_its_buffers() -> None:
    x = torch.randn(4, 4)
    out, indices = torch.empty(4, 4), torch.empty(1, 4, dtype=torch.uint8)
    halves = torch.empty(2, 4)
    for outputs, dim, n_keep, block in [
        ((torch.empty(4, 3), None), 0, 2, 4),
        ((torch.empty(4, 4, dtype=torch.float64), None), 0, 2, 4),
        ((out, None), 2, 2, 4),
        ((out, None), 0, 0, 4),
        ((out, None), 0, 4, 4),
        ((out, None), 0, 2, 33),
        ((out, indices), 0, 2, 4),
        ((halves, indices[:0]), 0, 2, 4),
        ((halves, indices.int()), 0, 2, 4),
        ((halves, indices), 0, 4, 8),
    ]:
        for isa in INSTRUCTION_SETS:
            with pytest.raises(ValueError):
                kernels.prune("mvue", x, *outputs, dim, n_keep, block, False, 0, isa, 1)
    for operator, relu, isa in [("sdgp", False, "baseline"), ("mvue", True, "baseline"), ("mvue", False, "v0")]:
        with pytest.raises(ValueError):
            kernels.prune(operator, x, out, None, 0, 2, 4, relu, 0, isa, 1)


def prune_node(*args: Any) -> fx.Node:
    """Return `prune(x, *args, key)` in a graph that returns it."""
    graph = fx.Graph()
    x, key = graph.placeholder("x"), graph.placeholder("key")
    node = graph.call_function(ops.prune, (x, *args, key))
    graph.output(node)
    node.meta[KEY] = NodeMeta("prune", LinearLayer("a", (8, 8), has_bias=False), Phase.UPDATE)
    return node


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize("axis", ["channels", "batch", "flat", "auto"])
@pytest.mark.parametrize(("shape", "channel_dim"), [((8, 6, 3, 3), 1), ((2, 6, 8), -1), ((5, 7), -1)])
def test_lowered_nodes_compute_the_same(axis: str, shape: tuple[int, ...], channel_dim: int, operator: str) -> None:
    backend, key = CpuBackend(), torch.tensor(11)
    node = prune_node(operator, 2, 4, axis, channel_dim)
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    drawn = key if OPERATORS[operator].needs_key else None
    expected = ops.prune(x, operator, 2, 4, axis, channel_dim, drawn)
    assert backend.supports(node).ok
    backend.lower(node)
    assert node.target is prune_natively and meta_of(node).kind == "prune"
    module = fx.GraphModule({}, node.graph)
    assert_same_bits(module(x, drawn), expected)
    assert_same_bits(copy.deepcopy(module)(x, drawn), expected)
    assert_same_bits(torch.compile(module, backend="aot_eager", fullgraph=True)(x, drawn), expected)


def test_refusals_have_reasons() -> None:
    backend = CpuBackend()
    assert "'uniform'" in backend.supports(prune_node("uniform", 2, 4, "flat", 1)).reason
    assert "64" in backend.supports(prune_node("mvue", 2, 64, "flat", 1)).reason
    assert "2:8" in backend.supports(prune_node("mvue_approx", 2, 8, "flat", 1)).reason
    assert backend.supports(fx.Graph().call_function(ops.add_bias, ())) == OTHER_KIND
    assert backend.available() == kernel_support()
