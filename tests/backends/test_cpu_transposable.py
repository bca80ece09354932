"""The native transposable mask against the reference: equal bit for bit, on every available instruction set."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig, Pruning
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.prune import PRUNE_MASK
from nmcompile.backends.cpu.transposable import (
    TRANSPOSABLE_MASK,
    Outputs,
    cpu_transposable_mask,
    cpu_transposable_out,
    cpu_transposable_pack,
)
from nmcompile.errors import OperandError
from nmcompile.native import INSTRUCTION_SETS, kernels
from nmcompile.pruning import NMPattern, transposable_mask
from nmcompile.pruning.packed import Packed, pack, packed_shapes, unpack
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.training.find_masks import masks_of
from tests.backends.operands import LAYOUTS, values

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def bits(x: Tensor) -> Tensor:
    """Return the tensor's bytes in index order, with all NaN alike: torch may change their other bits in a copy."""
    one = torch.where(x.isnan(), torch.nan, x) if x.is_floating_point() else x
    return one.contiguous().flatten().clone().view(torch.uint8)


def expected_outputs(w: Tensor, rows: int, columns: int) -> Outputs:
    """Return the reference's outputs, with packed forms where the dims allow both."""
    mask = transposable_mask(w, "2:4", dims=(rows, columns))
    pruned = torch.where(mask, w, 0.0)
    if w.shape[rows] % 4 or w.shape[columns] % 4:
        return Outputs(mask, pruned)
    return Outputs(mask, pruned, *pack(w, mask, columns), *pack(w, mask, rows))


def run_kernel(w: Tensor, rows: int, columns: int, like: Outputs, isa: str, threads: int = 1) -> Outputs:
    """Run the kernel for all outputs in `like`, on tensors with their strides that are filled with other values."""
    outputs = Outputs(*(None if one is None else torch.empty_like(one).copy_(one == 0) for one in like))
    kernels.transposable(w, rows, columns, *outputs, isa, threads)
    return outputs


def assert_same_outputs(actual: Outputs, expected: Outputs) -> None:
    for name, one, other in zip(Outputs._fields, actual, expected, strict=True):
        if other is not None:
            assert one is not None and bits(one).equal(bits(other)), name


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.integers(0, 9), max_size=2).map(tuple),
    st.tuples(st.integers(0, 21) | st.sampled_from([60, 64, 68]), st.integers(0, 21) | st.sampled_from([60, 64, 132])),
    st.sampled_from(["normal", "ties", "wide", "large", "sparse", "special"]),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(0, 2**31),
    st.data(),
)
def test_equals_the_reference(
    batch: tuple[int, ...],
    tiled: tuple[int, int],
    kind: str,
    dtype: torch.dtype,
    layout: str,
    seed: int,
    data: st.DataObject,
) -> None:
    order = data.draw(st.permutations(range(len(batch) + 2)))
    shape = tuple((*tiled, *batch)[i] for i in order)
    rows, columns = order.index(0), order.index(1)
    w = values(shape, kind, dtype, seed)
    w = LAYOUTS[layout](w) if w.numel() else w
    before = bits(w).clone()
    expected = expected_outputs(w, rows, columns)
    for isa in INSTRUCTION_SETS:
        assert_same_outputs(run_kernel(w, rows, columns, expected, isa), expected)
    mask = cpu_transposable_mask(w, rows - len(shape), columns)
    assert expected.mask is not None
    assert mask.equal(expected.mask) and mask.stride() == expected.mask.stride()
    assert bits(w).equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_equals_the_reference_on_every_half_precision_value(dtype: torch.dtype) -> None:
    words = torch.randperm(2**16, generator=torch.Generator().manual_seed(3))
    w = (words - 2**15).to(torch.int16).view(dtype).view(256, 256)
    expected = expected_outputs(w, 0, 1)
    for isa in INSTRUCTION_SETS:
        assert_same_outputs(run_kernel(w, 0, 1, expected, isa), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Convolution weights, with partial panels on both sides."""
    w = values((72, 136, 3, 3), "normal", dtype, seed=4).to(memory_format=memory_format)
    expected = expected_outputs(w, 0, 1)
    for isa, threads in product(INSTRUCTION_SETS, (1, 2, 4)):
        assert_same_outputs(run_kernel(w, 0, 1, expected, isa, threads), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_weight_too_large_for_the_caches_gets_the_same_bits(dtype: torch.dtype) -> None:
    """Such results bypass the caches; one more column moves rows off the alignment that this needs."""
    large = values((1024, 4096 + 64 + 1), "normal", dtype, seed=5)
    for w in (large[:, : 4096 + 64].contiguous(), large[:, : 4096 + 64]):
        expected = expected_outputs(w, 0, 1)
        for isa in INSTRUCTION_SETS:
            assert_same_outputs(run_kernel(w, 0, 1, expected, isa, 2), expected)


def all_patterns() -> Tensor:
    """Return the 90 masks of a 4x4 tile, `(90, 4, 4)`, in lexicographic order of the kept columns."""
    rows = [[column in pair for column in range(4)] for pair in combinations(range(4), 2)]
    tiles = torch.tensor(list(product(rows, repeat=4)))
    return tiles[(tiles.sum(1) == 2).all(1)]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 2**20), st.sampled_from([torch.float32, torch.float64]))
def test_keeps_as_much_as_the_best_of_all_patterns(seed: int, bound: int, dtype: torch.dtype) -> None:
    """For integers, whose sums are exact, it is the very first of the best patterns."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-bound, bound + 1, (4, 4 * 33), generator=generator).to(dtype)
    patterns = all_patterns()
    assert len(patterns) == 90
    tiles = w.abs().double().view(4, 33, 4).transpose(0, 1)
    sums = (patterns.double().flatten(1) @ tiles.flatten(1).T).T
    best = (sums == sums.amax(1, keepdim=True)).int().argmax(1)
    expected = patterns[best].transpose(0, 1).reshape(4, -1)
    for isa in INSTRUCTION_SETS:
        outputs = run_kernel(w, 0, 1, Outputs(mask=expected), isa)
        assert outputs.mask is not None and outputs.mask.equal(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dims"), [((12, 20), (0, 1)), ((12, 20), (1, 0)), ((8, 16, 3, 3), (0, 1))])
def test_packed_forms_hold_the_pruned_weight(dtype: torch.dtype, shape: tuple[int, ...], dims: tuple[int, int]) -> None:
    w = values(shape, "normal", dtype, seed=6)
    pruned = torch.where(transposable_mask(w, "2:4", dims=dims), w, 0.0)
    packed = cpu_transposable_pack(w, *dims)
    for form, dim in ((Packed(*packed[:2]), dims[1]), (Packed(*packed[2:]), dims[0])):
        assert (form.values.shape, form.indices.shape) == packed_shapes(shape, dim)
        assert unpack(form, dim).equal(pruned)


def test_writes_only_what_is_asked_for() -> None:
    w = torch.randn(8, 64)
    expected = expected_outputs(w, 0, 1)
    for wanted in (
        ("mask",),
        ("pruned",),
        ("forward_values", "forward_indices"),
        ("backward_values", "backward_indices"),
    ):
        outputs = {name: torch.zeros_like(getattr(expected, name)) for name in wanted}
        cpu_transposable_out(w, 0, 1, **outputs)
        for name, out in outputs.items():
            assert out.equal(getattr(expected, name))


def test_negated_views_parameters_and_many_dims_are_taken() -> None:
    negated = torch.randn(8, 8, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    assert cpu_transposable_mask(negated, 0, 1).equal(transposable_mask(negated, "2:4"))
    parameter = nn.Parameter(torch.randn(8, 8))
    mask = cpu_transposable_mask(parameter, 0, 1)
    assert mask.equal(transposable_mask(parameter, "2:4")) and not mask.requires_grad
    many = torch.randn(2, 1, 2, 1, 2, 1, 2, 8, 8)
    assert cpu_transposable_mask(many, -2, -1).equal(transposable_mask(many, "2:4"))
    packed = cpu_transposable_pack(many, -2, -1)
    assert unpack(Packed(*packed[:2]), 8).equal(unpack(Packed(*packed[2:]), 7))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(layout: str) -> None:
    w = torch.randn(8, 12, 3, 5)
    w = w.to(memory_format=torch.channels_last) if layout == "channels_last" else LAYOUTS.get(layout, torch.clone)(w)
    torch.library.opcheck(torch.ops.nmcompile.cpu_transposable_mask.default, (w, 0, 1))
    torch.library.opcheck(torch.ops.nmcompile.cpu_transposable_pack.default, (w, 0, 1))
    outputs = {"mask": torch.empty_like(w, dtype=torch.bool), "pruned": torch.empty_like(w)}
    torch.library.opcheck(torch.ops.nmcompile.cpu_transposable_out.default, (w, 0, 1), outputs)


def test_wrong_operands_are_named() -> None:
    w = torch.randn(8, 8)
    with pytest.raises(OperandError, match="same dim"):
        cpu_transposable_mask(w, 0, -2)
    with pytest.raises(OperandError, match=r"torch\.int32"):
        cpu_transposable_mask(w.int(), 0, 1)
    with pytest.raises(OperandError, match="not a multiple of 4"):
        cpu_transposable_pack(torch.randn(8, 6), 0, 1)
    with pytest.raises(OperandError, match=r"pruned is torch\.float64 .* expected torch\.float32"):
        cpu_transposable_out(w, 0, 1, pruned=w.double())
    with pytest.raises(OperandError, match="give both"):
        cpu_transposable_out(w, 0, 1, forward_values=torch.empty(8, 4))


def test_the_module_refuses_what_would_leave_its_buffers() -> None:
    w, best = torch.randn(8, 8), INSTRUCTION_SETS[0]
    empty = torch.empty
    for dims, outputs, isa in [
        ((0, 2), Outputs(), best),
        ((1, 1), Outputs(), best),
        ((0, 1), Outputs(), "v9"),
        ((0, 1), Outputs(mask=empty(8, 7, dtype=torch.bool)), best),
        ((0, 1), Outputs(pruned=empty(8, 8, dtype=torch.float64)), best),
        ((0, 1), Outputs(forward_values=empty(8, 4)), best),
        ((0, 1), Outputs(forward_values=empty(8, 4), forward_indices=empty(8, 2, dtype=torch.uint8)), best),
        ((0, 1), Outputs(backward_values=empty(4, 8), backward_indices=empty(1, 8)), best),
    ]:
        with pytest.raises(ValueError):
            kernels.transposable(w, *dims, *outputs, isa, 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_compiled_models_compute_their_masks_with_it(groups: int) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=groups), nn.ReLU(), nn.Conv2d(24, 8, 3)
    )
    x = torch.randn(2, 8, 12, 12)
    native = nmcompile.compile(model, "t-weights", args=(x,), backend="cpu")
    reference = nmcompile.compile(model, "t-weights", args=(x,), backend="reference")
    native(x), reference(x)
    masks, others = masks_of(native), masks_of(reference)
    assert masks and masks.keys() == others.keys()
    for name, mask in masks.items():
        assert (mask.kernel, others[name].kernel) == (TRANSPOSABLE_MASK, "")
        assert mask.tensor.any() and mask.tensor.equal(others[name].tensor)
    assert "prune: cpu" in nmcompile.inspect(native).layer("2").kernels[nmcompile.Phase.FORWARD]


@pytest.mark.parametrize(("operator", "kernel"), [("greedy", PRUNE_MASK), ("transposable_greedy", "")])
def test_other_masks_take_their_own_kernel_or_the_reference(operator: str, kernel: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8))
    pruned = LayerConfig(weight=Pruning(operator, NMPattern(2, 4)))
    config = CompileConfig(layers={"1": pruned})
    x = torch.randn(2, 8)
    compiled = nmcompile.compile(model, "weights", args=(x,), config=config, backend="cpu")
    reference = nmcompile.compile(model, "weights", args=(x,), config=config, backend="reference")
    assert compiled(x).equal(reference(x))
    ((name, mask),) = masks_of(compiled).items()
    assert mask.kernel == kernel
    assert mask.tensor.any() and mask.tensor.equal(masks_of(reference)[name].tensor)


def test_masks_of_inputs_are_found_by_a_kernel() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    x = torch.randn(2, 8)
    compiled = nmcompile.compile(model, "activations", args=(x,), backend="cpu")
    assert compiled(x).equal(nmcompile.compile(model, "activations", args=(x,), backend="reference")(x))
    forwards = [triple.graphs[nmcompile.Phase.FORWARD] for triple in triples_of(compiled)]
    assert any("cpu_prune_mask" in graph.code for graph in forwards)
