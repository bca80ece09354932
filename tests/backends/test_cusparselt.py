"""The cuSPARSELt backend without a GPU: its rules, and its products with a library made of PyTorch's own operations.

The tests marked `gpu` show what only a GPU can show: that the library is right, and faster.
"""

from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig, NMPattern, Phase
from nmcompile.backends.cusparselt import CusparseltBackend, algorithms, kept_weights, operand, product, support
from nmcompile.backends.cusparselt.algorithms import best_algorithm, forget_algorithms
from nmcompile.backends.cusparselt.library import Algorithm, Problem
from nmcompile.backends.cusparselt.operand import Operand
from nmcompile.backends.cusparselt.operators import (
    linear_forward,
    linear_input_gradient,
    linear_weight_gradient,
    pointwise_forward,
    pointwise_input_gradient,
)
from nmcompile.backends.cusparselt.product import Product
from nmcompile.backends.cusparselt.support import (
    Sizes,
    cusparselt_support,
    float16_refusal,
    padded,
)
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.backends.shared.sparse_operand import pattern_support
from nmcompile.backends.triton.support import KEEP
from nmcompile.errors import BackendUnavailable, LibraryError
from nmcompile.ir.choice import Choice
from nmcompile.ir.choice_slot import ChoiceSlot
from nmcompile.ir.node_meta import find_meta
from nmcompile.ir.operations import apply_mask
from nmcompile.ir.protocols import Support
from nmcompile.pruning import OPERATORS
from nmcompile.weight_cache import WeightCache

gpu = [pytest.mark.gpu, pytest.mark.skipif(not cusparselt_support().ok, reason=cusparselt_support().reason)]
RIGHT = Algorithm(3, 2)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (Sizes(64, 64, 8), Sizes(64, 64, 8)),
        (Sizes(1, 1, 1), Sizes(64, 64, 8)),
        (Sizes(65, 36, 9), Sizes(128, 64, 16)),
        (Sizes(4096, 1024, 13008), Sizes(4096, 1024, 13008)),
    ],
)
def test_padding(sizes: Sizes, expected: Sizes) -> None:
    assert padded(sizes) == expected


@pytest.mark.parametrize(
    ("version", "words"), [((0, 8, 0), "0.8.0, slower than others on Hopper"), ((0, 10, 1), "cuSPARSELt 0.10.1")]
)
def test_the_version_is_told_and_a_bad_one_is_named(
    version: tuple[int, int, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(support, "library_version", lambda: version)
    monkeypatch.setattr(support, "library_loads", lambda: True)
    assert CusparseltBackend().available().ok and words in CusparseltBackend().available().reason
    monkeypatch.setattr(support, "library_loads", lambda: False)
    assert "libcusparseLt.so.0" in cusparselt_support().reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old one")
    assert "capability (7, 5)" in cusparselt_support().reason
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "without cuSPARSELt" in cusparselt_support().reason


@pytest.mark.parametrize(
    ("pattern", "ok"), [("2:4", True), ("1:2", True), ("1:4", True), ("4:8", False), ("3:4", False)]
)
def test_patterns(pattern: str, ok: bool) -> None:
    assert pattern_support(NMPattern.parse(pattern)).ok is ok


def test_without_the_library_a_request_for_it_says_why() -> None:
    if cusparselt_support().ok:
        pytest.skip("cuSPARSELt is there")
    with pytest.raises(BackendUnavailable, match="'cusparselt' cannot run here: "):
        nmcompile.compile(nn.Linear(8, 8), backend="cusparselt")


@pytest.mark.parametrize(("capability", "refused"), [((9, 0), True), ((8, 0), False), ((10, 0), False)])
def test_a_kernel_that_ends_the_process_is_left_alone(capability: tuple[int, int], refused: bool) -> None:
    assert ("ends the process" in float16_refusal(capability)) is refused


class StandIn:
    """A plan of a library that takes CPU tensors, checks its arguments, and has one right algorithm."""

    made: list[Problem]

    def __init__(self, problem: Problem, algorithm: Algorithm) -> None:
        if algorithm.id > 3:
            raise LibraryError("no such algorithm")
        self.made.append(problem)
        self.problem, self.algorithm = problem, algorithm

    def run(self, compressed: Tensor, dense: Tensor, bias: Tensor | None, stream: int) -> Tensor:
        rows, depth, lanes, by_depth, by_rows, has_bias, *_ = self.problem
        assert Sizes(rows, depth, lanes) == padded(Sizes(rows, depth, lanes))
        assert compressed.shape == (rows, depth) and dense.shape == ((depth, lanes) if by_depth else (lanes, depth))
        assert dense.is_contiguous() and has_bias is (bias is not None)
        result = F.linear(dense.t() if by_depth else dense, compressed, bias)
        result = result.t().contiguous() if by_rows else result
        return result if self.algorithm == RIGHT else result * (1.5 if self.algorithm.id % 2 else torch.nan)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Problem]]:
    """Install the stand-in library; return the problems that plans were made for."""

    def compress(matrix: Tensor) -> Tensor:
        assert matrix.is_contiguous()
        assert int((matrix != 0).unflatten(1, (-1, 4)).sum(-1).max()) <= 2
        return matrix.clone()

    for forms in ("_compressed", "_masked"):
        monkeypatch.setattr(kept_weights, forms, WeightCache())
    made: list[Problem] = []
    monkeypatch.setattr(StandIn, "made", made, raising=False)
    monkeypatch.setattr(operand, "compress", compress)
    monkeypatch.setattr(algorithms, "Plan", StandIn)
    monkeypatch.setattr(algorithms, "algorithm_count", lambda _: 6)
    monkeypatch.setattr(product, "kept_plan", lambda problem, algorithm, _: StandIn(problem, algorithm))
    for module in (product, algorithms):
        monkeypatch.setattr(module, "stream_of", lambda _: 0)
    monkeypatch.setattr(product, "operand_refusal", lambda *_: "")
    monkeypatch.setattr(support, "cusparselt_support", lambda: Support(True))
    monkeypatch.setattr(CusparseltBackend, "available", lambda _: Support(True))
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    forget_algorithms()
    yield made
    forget_algorithms()


def pruned(*shape: int, dim: int = 1) -> Tensor:
    """Prune 2:4 along a dim."""
    places = torch.arange(shape[dim]).view(*(-1 if d == dim else 1 for d in range(len(shape))))
    return torch.where(places % 4 < 2, torch.randn(*shape), 0.0)


@pytest.mark.parametrize("by_depth", [True, False])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("sizes", [Sizes(64, 64, 8), Sizes(20, 8, 3), Sizes(64, 100, 17), Sizes(4, 4, 1)])
def test_products_are_padded_and_cut(
    sizes: Sizes, dim: int, by_rows: bool, by_depth: bool, stand_in: list[Problem]
) -> None:
    shape = (sizes.rows, sizes.depth) if dim == 1 else (sizes.depth, sizes.rows)
    sparse, dense = pruned(*shape, dim=dim), torch.randn(sizes.lanes, sizes.depth)
    bias = torch.randn(sizes.rows)
    given = dense.t().contiguous() if by_depth else dense
    result = Product(Operand(sparse, dim), given, bias, by_depth, by_rows).multiply()
    assert result is not None and result.is_contiguous()
    expected = F.linear(dense, sparse.t() if dim == 0 else sparse, bias)
    torch.testing.assert_close(result, expected.t() if by_rows else expected)
    assert {Sizes(*problem[:3]) for problem in stand_in} == {padded(sizes)}


def test_an_operand_is_masked_and_pruned(stand_in: list[Problem]) -> None:
    matrix, mask, key = torch.randn(16, 12), torch.rand(16, 12) < 0.5, torch.tensor(7)
    masked = Operand(matrix, 0, mask, "mvue", NMPattern(1, 2), key).pruned()
    assert torch.equal(masked, OPERATORS["mvue"].prune(torch.where(mask, matrix, 0.0), "1:2", 0, key))
    assert torch.equal(Operand(matrix, 0, mask).pruned(), matrix * mask)


PROBLEM = Problem(64, 64, 8, False, False, True, torch.float32, torch.device("cpu"))


def test_a_wrong_algorithm_is_never_taken(stand_in: list[Problem]) -> None:
    assert best_algorithm(PROBLEM) == RIGHT
    before = len(stand_in)
    assert best_algorithm(PROBLEM) == RIGHT
    assert len(stand_in) == before, "searched again"


def test_what_a_layer_multiplies_first_has_no_say(stand_in: list[Problem]) -> None:
    """Zeros would make every algorithm look right, and a NaN none."""
    for value in (0.0, torch.nan):
        forget_algorithms()
        dense = torch.full((8, 64), value)
        Product(Operand(pruned(64, 64), 1), dense).multiply()
        assert best_algorithm(PROBLEM._replace(has_bias=False)) == RIGHT


def test_the_search_heeds_determinism_and_capture(stand_in: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "_time", lambda *_: pytest.fail("a clock decides"))
    torch.use_deterministic_algorithms(True)
    try:
        assert best_algorithm(PROBLEM) == RIGHT
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(algorithms, "is_capturing", lambda _: True)
    monkeypatch.setattr(algorithms, "_trial", lambda _: pytest.fail("searched"))
    assert best_algorithm(PROBLEM) is None


@pytest.mark.parametrize("error", [LibraryError("no"), torch.OutOfMemoryError()])
def test_a_search_that_fails_leaves_the_dense_kernel(
    error: Exception, stand_in: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(problem: Problem) -> int:
        raise error

    monkeypatch.setattr(algorithms, "algorithm_count", fail)
    assert best_algorithm(PROBLEM) is None
    monkeypatch.setattr(algorithms, "algorithm_count", lambda _: 6)
    assert best_algorithm(PROBLEM) is None, "searched in every call"
    forget_algorithms()
    assert best_algorithm(PROBLEM) == RIGHT


def test_where_every_algorithm_is_wrong_the_dense_kernel_runs(
    stand_in: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algorithms, "_right_algorithms", lambda *_: iter(()))
    product_ = Product(Operand(pruned(64, 64), 1), torch.randn(8, 64))
    dense = torch.ones(3)
    result, choice = product_.run(lambda rows: rows, lambda: dense)
    assert result is dense and choice.kernel == "dense"


@pytest.fixture
def compressions(stand_in: list[Problem], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the list of compressed operands, without those of the search for an algorithm."""
    found: list[Tensor] = []
    compress = operand.compressed

    def noted(given: Operand, rows: int, depth: int) -> Tensor:
        found.append(given.matrix)
        return compress(given, rows, depth)

    monkeypatch.setattr(product, "compressed", noted)
    return found


def at_rest(layer: nn.Module) -> nn.Module:
    return nmcompile.compile(layer, "weights", config=CompileConfig(ends="sparse"), backend="cusparselt")


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Linear(64, 64), torch.randn(8, 64)), (nn.Conv2d(64, 64, 1, bias=False), torch.randn(2, 64, 2, 2))],
)
def test_a_weight_at_rest_is_compressed_once(layer: nn.Module, x: Tensor, compressions: list[Tensor]) -> None:
    compiled, weight = at_rest(layer), layer.get_parameter("weight")
    with torch.no_grad():
        first, *_, last = (compiled(x) for _ in range(3))
        assert len(compressions) == 1 and torch.equal(first, last)
        weight.mul_(2.0)
        torch.testing.assert_close(compiled(x), nmcompile.finalize(compiled)(x))
    assert len(compressions) == 2


def test_a_call_with_gradients_forgets_what_is_kept(compressions: list[Tensor]) -> None:
    """Fused optimizers do not count versions; only the call with gradients shows that a weight is trained."""
    compiled, x = at_rest(nn.Linear(64, 64)), torch.randn(8, 64)
    with torch.no_grad():
        compiled(x)
    assert len(kept_weights._compressed) == 1
    compiled(x), compiled(x)
    assert len(kept_weights._compressed) == 0 and len(compressions) == 3


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_training_under_autocast_keeps_nothing_stale(
    form: str, compressions: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operators see autocast's copy of the weight; a frozen model compares nothing."""
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice(form, "the test asks for it"))
    compiled, x = at_rest(nn.Linear(64, 64)), torch.randn(8, 64)
    optimizer = torch.optim.AdamW(compiled.parameters(), 0.1, fused=True)
    nmcompile.freeze(compiled)
    with torch.no_grad():
        compiled(x)
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("dense", "the test asks for it"))
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x).square().mean().backward()
    optimizer.step()
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice(form, "the test asks for it"))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), nmcompile.finalize(compiled)(x))


def test_only_parameters_are_kept(compressions: list[Tensor]) -> None:
    """Autocast makes another tensor for each call, which is never seen again."""
    compiled, x = at_rest(nn.Linear(64, 64)), torch.randn(8, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        compiled(x), compiled(x)
    assert len(compressions) == 2 and len(kept_weights._compressed) == 0


def test_two_sizes_keep_both_forms(compressions: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The sparse kernel runs for the larger size; a graph may have captured its operand."""

    def choose(problem: tuple[str, Sizes], *_: object) -> Choice:
        return Choice("sparse" if problem[1].lanes > 8 else "dense", "the test asks for it")

    monkeypatch.setattr(choices, "_choice", choose)
    compiled, sizes = at_rest(nn.Linear(64, 64)), [torch.randn(n, 64) for n in (16, 8)]
    with torch.no_grad():
        for x in 3 * sizes:
            torch.testing.assert_close(compiled(x), nmcompile.finalize(compiled)(x))
    assert len(compressions) == 1


def test_what_lost_the_measurement_is_not_kept(compressions: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(*given: object) -> Choice:
        sparse, dense = given[3:5]
        assert callable(sparse) and callable(dense)
        sparse(), dense()
        return Choice("dense", "the test measured")

    monkeypatch.setattr(choices, "_choice", choose)
    with torch.no_grad():
        compiled = at_rest(nn.Linear(64, 64))
        compiled(torch.randn(8, 64))
    assert (len(kept_weights._compressed), len(kept_weights._masked)) == (0, 1)


def test_a_graph_that_is_captured_makes_what_is_not_there(
    compressions: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, x = at_rest(nn.Linear(64, 64)), torch.randn(8, 64)
    monkeypatch.setattr(kept_weights, "is_capturing", lambda _: True)
    captured: list[tuple[StorageWeakRef, Tensor]] = []
    monkeypatch.setattr(kept_weights, "_captured", captured)
    with torch.no_grad():
        compiled(x), compiled(x)
        assert len(compressions) == 2 and not captured, "what a capture makes is not there before a replay"
        monkeypatch.setattr(kept_weights, "is_capturing", lambda _: False)
        compiled(x)
        monkeypatch.setattr(kept_weights, "is_capturing", lambda _: True)
        compiled(x), compiled(x)
        assert len(compressions) == 3 and len(captured) == 1
        compiled.weight.mul_(2)  # type: ignore[operator]
        compiled(x)
    assert len(compressions) == 4 and len(captured) == 1, "what was there is of another weight"


def test_the_form_that_a_graph_reads_goes_with_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[tuple[StorageWeakRef, Tensor]] = []
    monkeypatch.setattr(kept_weights, "_captured", captured)
    first, second, form = torch.ones(2), torch.ones(2), torch.ones(1)
    kept_weights._pin(torch.zeros(1), first)
    kept_weights._pin(form, second)
    assert len(captured) == 2
    del first
    kept_weights._pin(form, second)
    assert [pinned for _, pinned in captured] == [form]


def layers() -> list[tuple[nn.Module, Tensor]]:
    return [
        (nn.Linear(20, 12), torch.randn(3, 5, 20)),
        (nn.Linear(16, 32, bias=False), torch.randn(7, 16)),
        (nn.Conv2d(8, 16, 1), torch.randn(2, 8, 3, 5)),
        (nn.Conv2d(8, 16, 1, bias=False), torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)),
        (nn.Conv1d(8, 16, 1), torch.randn(2, 8, 5)),
    ]


@pytest.mark.parametrize("mode", ["t-weights", "training"])
@pytest.mark.parametrize("index", range(5))
def test_a_layer_trains_as_with_the_reference_backend(index: int, mode: str, stand_in: list[Problem]) -> None:
    layer, x = layers()[index]
    results: list[list[Tensor]] = []
    for backend in ("cusparselt", "reference"):
        torch.manual_seed(0)
        compiled = nmcompile.compile(layer, mode, config=CompileConfig(ends="sparse"), backend=backend)
        leaf = x.detach().requires_grad_()
        y = compiled(leaf)
        gradients = torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])
        results.append([y, *gradients])
        if backend == "cusparselt":
            kernels = nmcompile.inspect(compiled).layer("").kernels
            assert "gemm: cusparselt" in kernels[Phase.FORWARD] and "gemm: cusparselt" in kernels[Phase.BACKWARD]
            is_sparse = mode == "training" and isinstance(layer, nn.Linear)
            assert f"gemm: {'cusparselt' if is_sparse else 'reference'}" in kernels[Phase.UPDATE]
    assert stand_in, "the library was not called"
    for ours, theirs in zip(*results, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "mode", "words"),
    [
        (nn.Conv2d(8, 8, 3), "t-weights", "only 1x1 convolutions"),
        (nn.Conv2d(8, 8, 1, stride=2), "t-weights", "only 1x1 convolutions"),
        (nn.Linear(8, 8), "gradients", "not pruned"),
        (nn.Conv2d(8, 8, 1), "training", "pruned across the batch"),
    ],
)
def test_refusals(layer: nn.Module, mode: str, words: str, stand_in: list[Problem]) -> None:
    compiled = nmcompile.compile(layer, mode, config=CompileConfig(ends="sparse"), backend="cusparselt")
    graphs = nmcompile.inspect(compiled).layer("").graphs
    nodes = [node for phase in (Phase.FORWARD, Phase.UPDATE) for node in graphs[phase].graph.nodes]
    refusals = [one for meta in map(find_meta, nodes) if meta is not None for one in meta.refusals]
    assert any(one.backend == "cusparselt" and words in one.reason for one in refusals)


def test_other_devices_and_dtypes_run_dense_and_say_so() -> None:
    assert "on cpu" in support.operand_refusal(torch.ones(2, dtype=torch.float16))
    meta = torch.ones(2, device="meta")
    x, w = torch.randn(4, 8), pruned(8, 8)
    slot = ChoiceSlot("fc forward")
    assert torch.equal(linear_forward(x, w, None, None, False, slot.name), F.linear(x, w))
    assert "meta" in support.operand_refusal(meta)
    choice = slot.latest
    assert choice is not None and choice.kernel == "dense" and "not on cuda" in choice.reason


@pytest.mark.parametrize(
    ("dtype", "device", "refused"),
    [(torch.bfloat16, "cuda:0", False), (torch.float16, "cuda:0", True), (torch.bfloat16, "cuda:1", True)],
)
def test_operands_of_two_types_or_devices_are_refused(dtype: torch.dtype, device: str, refused: bool) -> None:
    def operand_on(dtype: torch.dtype, device: str) -> Any:
        return SimpleNamespace(dtype=dtype, device=torch.device(device), numel=lambda: 1)

    refusal = support.operand_refusal(operand_on(torch.bfloat16, "cuda:0"), operand_on(dtype, device))
    assert bool(refusal) is refused
    assert not refused or (str(dtype) in refusal and device in refusal)


CHECKS = "test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fakes_and_schemas(layout: torch.memory_format, stand_in: list[Problem]) -> None:
    x, w, b, dy = torch.randn(3, 5, 8), pruned(12, 8), torch.randn(12), torch.randn(3, 5, 12)
    key = torch.tensor(3)
    for transposed in (False, True):
        weight = w.t().contiguous() if transposed else w
        torch.library.opcheck(linear_forward, (x, weight, None, b, transposed, "a"), test_utils=CHECKS)
        other = pruned(12, 8, dim=0).t().contiguous() if transposed else pruned(12, 8, dim=0)
        torch.library.opcheck(linear_input_gradient, (dy, other, other != 0, transposed, "b"), test_utils=CHECKS)
        rule = "mvue", 2, 4, "auto", key
        torch.library.opcheck(linear_weight_gradient, (dy, x, *rule, transposed, "c"), test_utils=CHECKS)
    x, dy = (torch.randn(2, c, 3, 4).contiguous(memory_format=layout) for c in (8, 12))
    torch.library.opcheck(pointwise_forward, (x, pruned(12, 8, 1, 1), None, b, "d"), test_utils=CHECKS)
    weight = pruned(12, 8, 1, 1, dim=0)
    torch.library.opcheck(pointwise_input_gradient, (dy, weight, weight != 0, x, "e"), test_utils=CHECKS)


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_lie_as_the_input_does_whatever_the_weight(
    layout: torch.memory_format, kernel: str, stand_in: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice(kernel, "the test asks for it"))
    x, dy = torch.randn(2, 8, 3, 4).contiguous(memory_format=layout), torch.randn(2, 12, 3, 4)
    forward, backward = (
        torch.empty_strided((12, 8, 1, 1), (8, 1, 8, 8)).copy_(pruned(12, 8, 1, 1, dim=dim)) for dim in (1, 0)
    )
    assert forward.is_contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(pointwise_forward, (x, forward, None, None, "a"), test_utils=CHECKS)
    assert pointwise_forward(x, forward, None, None, "a").is_contiguous(memory_format=layout)
    torch.library.opcheck(pointwise_input_gradient, (dy, backward, None, x, "a"), test_utils=CHECKS)
    assert pointwise_input_gradient(dy, backward, None, x, "a").is_contiguous(memory_format=layout)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axis", ["auto", "flat", "batch"])
def test_updates_prune_as_the_reference_does(axis: str, transposed: bool, stand_in: list[Problem]) -> None:
    dy, x, key = torch.randn(4, 6, 12), torch.randn(4, 6, 8), torch.tensor(5)
    dim_0 = dy if axis == "batch" else dy.flatten(0, 1)
    zeros = OPERATORS["mvue"].prune(dim_0, "2:4", 0, key).view(24, 12)
    expected = zeros.t() @ x.flatten(0, 1)
    expected = expected.t() if transposed else expected
    torch.testing.assert_close(linear_weight_gradient(dy, x, "mvue", 2, 4, axis, key, transposed, "u"), expected)
    given = zeros.view_as(dy) if axis != "batch" else dy
    if axis != "batch":
        result = linear_weight_gradient(given, x, KEEP, 2, 4, axis, None, transposed, "u")
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("by_depth", [False, True])
@pytest.mark.parametrize("sizes", [Sizes(128, 64, 32), Sizes(20, 40, 3), Sizes(1024, 4096, 2048)])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_the_library_multiplies(sizes: Sizes, by_depth: bool, dim: int, dtype: torch.dtype, device: str) -> None:
    shape = (sizes.rows, sizes.depth) if dim == 1 else (sizes.depth, sizes.rows)
    matrix = torch.randn(shape, device=device, dtype=dtype)
    if refusal := support.operand_refusal(matrix):
        pytest.skip(refusal)
    mask = OPERATORS["greedy"].prune(matrix, "2:4", dim, None) != 0
    dense = torch.randn(sizes.lanes, sizes.depth, device=device, dtype=dtype)
    bias = torch.randn(sizes.rows, device=device, dtype=dtype)
    given = dense.t().contiguous() if by_depth else dense
    result = Product(Operand(matrix, dim, mask), given, bias, by_depth).multiply()
    lines = torch.where(mask, matrix, 0.0).movedim(dim, 1)
    exact = F.linear(dense.double(), lines.double(), bias.double())
    assert result is not None
    assert float((result.double() - exact).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 64), (128, 192), (1024, 4096)])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_our_kernel_compresses_as_the_library_does(size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    assert operand.checked_layout(*size, dtype, torch.device(device, 0)) is not None


def test_a_dense_weight_at_rest_is_masked_once(stand_in: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("dense", "the test asks for it"))
    calls = count()

    def counted(weight: Tensor, mask: Tensor) -> Tensor:
        next(calls)
        return apply_mask(weight, mask)

    monkeypatch.setattr(f"{kept_weights.__name__}.apply_mask", counted)
    layer, x = nn.Linear(64, 64), torch.randn(8, 64)
    compiled = nmcompile.compile(layer, "weights", config=CompileConfig(ends="sparse"), backend="cusparselt")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x), nmcompile.finalize(compiled)(x))
    assert next(calls) == 1
    assert len(kept_weights._masked) == 1 and len(kept_weights._compressed) == 0


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Force the sparse kernels to run, however long they take."""
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    return torch.device("cuda", 0)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("layer", [pytest.param(nn.Linear(256, 512), marks=gpu)])
def test_a_layer_trains_on_the_gpu_as_with_the_reference_backend(
    layer: nn.Linear, is_compiled: bool, on_gpu: torch.device
) -> None:
    layer = layer.to(on_gpu, torch.bfloat16)
    x = torch.randn(4, 96, 256, device=on_gpu, dtype=torch.bfloat16)
    gradient = torch.randn(4, 96, 512, device=on_gpu, dtype=torch.bfloat16)
    results: list[list[Tensor]] = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        compiled = nmcompile.compile(layer, "training", config=CompileConfig(ends="sparse"), backend=backend)
        run = torch.compile(compiled, fullgraph=True) if is_compiled else compiled
        leaf = x.detach().requires_grad_()
        y = run(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], gradient)])
        kernels = nmcompile.inspect(compiled).layer("").kernels
        assert backend == "reference" or all("cusparselt" in found for found in kernels.values())
    for ours, theirs in zip(*results, strict=True):
        assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 2**-8


@pytest.mark.parametrize("layer", [pytest.param(nn.Linear(256, 512), marks=gpu)])
def test_a_layer_at_rest_is_captured_in_a_graph(layer: nn.Linear, on_gpu: torch.device) -> None:
    layer = layer.to(on_gpu, torch.bfloat16)
    compiled = nmcompile.compile(layer, "weights", config=CompileConfig(ends="sparse"))
    x = torch.randn(64, 256, device=on_gpu, dtype=torch.bfloat16)
    nmcompile.freeze(compiled)
    with torch.no_grad():
        compiled(x)
        assert len(kept_weights._compressed) == 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = compiled(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, compiled(x))


@pytest.mark.parametrize("layer", [pytest.param(nn.Linear(256, 512), marks=gpu)])
def test_on_a_gpu_nothing_is_cached_of_a_model_that_is_not_frozen(layer: nn.Linear, on_gpu: torch.device) -> None:
    layer = layer.to(on_gpu, torch.bfloat16)
    compiled = nmcompile.compile(layer, "weights", config=CompileConfig(ends="sparse"))
    x = torch.randn(64, 256, device=on_gpu, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled(x)
        layer.weight.data.copy_(torch.randn_like(layer.weight))
        torch.testing.assert_close(compiled(x), nmcompile.finalize(compiled)(x))
    assert len(kept_weights._compressed) == 0


@pytest.mark.parametrize("layer", [pytest.param(nn.Linear(256, 512), marks=gpu)])
def test_a_step_never_waits_for_the_gpu(layer: nn.Linear, on_gpu: torch.device) -> None:
    layer = layer.to(on_gpu, torch.bfloat16)
    compiled = nmcompile.compile(layer, "training", config=CompileConfig(ends="sparse"))
    x = torch.randn(384, 256, device=on_gpu, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(384, 512, device=on_gpu, dtype=torch.bfloat16)
    compiled(x).backward(gradient)
    torch.optim.SGD(compiled.parameters(), 0.1).step()
    compiled(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compiled(x).backward(gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")
