"""The cuSPARSELt backend without a GPU: its rules, and its products with a library of PyTorch's own operations.

What only a GPU shows (that the library is right, and faster) is in the tests marked `gpu`.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig, NMPattern, Phase
from nmcompile.backends import choices
from nmcompile.backends.cusparselt import CusparseltBackend, library, product, support
from nmcompile.backends.cusparselt.library import Algorithm, best_algorithm, forget_algorithms
from nmcompile.backends.cusparselt.operators import (
    linear_forward,
    linear_input_gradient,
    pointwise_forward,
    pointwise_input_gradient,
)
from nmcompile.backends.cusparselt.product import Product, run_product, sparse_product
from nmcompile.backends.cusparselt.support import Sizes, cusparselt_support, padded, pattern_support, version_text
from nmcompile.errors import BackendUnavailable
from nmcompile.ir.choice import Choice
from nmcompile.ir.protocols import Support

gpu = [pytest.mark.gpu, pytest.mark.skipif(not cusparselt_support().ok, reason=cusparselt_support().reason)]
RIGHT = Algorithm(3, 2)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (Sizes(16, 16, 8), Sizes(16, 16, 8)),
        (Sizes(1, 1, 1), Sizes(16, 16, 8)),
        (Sizes(17, 36, 9), Sizes(32, 48, 16)),
        (Sizes(4096, 1024, 13008), Sizes(4096, 1024, 13008)),
    ],
)
def test_padding(sizes: Sizes, expected: Sizes) -> None:
    assert padded(sizes) == expected


@pytest.mark.parametrize(("number", "text"), [(400, "0.4.0"), (602, "0.6.2"), (800, "0.8.0"), (10203, "1.2.3")])
def test_versions(number: int, text: str) -> None:
    assert version_text(number) == text


@pytest.mark.parametrize(("number", "words"), [(800, "slower than others on Hopper"), (801, "cuSPARSELt 0.8.1")])
def test_the_version_is_told_and_a_bad_one_is_named(number: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: number)
    assert CusparseltBackend().available().ok and words in CusparseltBackend().available().reason
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


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Sizes]]:
    """A library that takes CPU tensors, checks what it is given, and has one right algorithm among wrong ones."""
    calls: list[Sizes] = []

    def compress(matrix: Tensor) -> Tensor:
        assert matrix.is_contiguous()
        assert int((matrix != 0).unflatten(1, (-1, 4)).sum(-1).max()) <= 2
        return matrix

    def multiply(compressed: Tensor, dense: Tensor, bias: Tensor | None, algorithm: Algorithm) -> Tensor:
        calls.append(Sizes(compressed.shape[0], compressed.shape[1], dense.shape[0]))
        assert calls[-1] == padded(calls[-1]) and dense.is_contiguous()
        if algorithm.id > 5:
            raise RuntimeError("no such algorithm")
        result = F.linear(dense, compressed, bias)
        return result if algorithm == RIGHT else result * (1.5 if algorithm.id % 2 else torch.nan)

    monkeypatch.setattr(product, "compress", compress)
    for module in (product, library):
        monkeypatch.setattr(module, "multiply", multiply)
    monkeypatch.setattr(product, "operand_refusal", lambda *_: "")
    monkeypatch.setattr(support, "cusparselt_support", lambda: Support(True))
    monkeypatch.setattr(CusparseltBackend, "available", lambda _: Support(True))
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    forget_algorithms()
    yield calls
    forget_algorithms()


def pruned(*shape: int, dim: int = 1) -> Tensor:
    """2:4 along a dim."""
    places = torch.arange(shape[dim]).view(*(-1 if d == dim else 1 for d in range(len(shape))))
    return torch.where(places % 4 < 2, torch.randn(*shape), 0.0)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("sizes", [Sizes(16, 16, 8), Sizes(20, 8, 3), Sizes(64, 100, 17), Sizes(4, 4, 1)])
def test_products_are_padded_and_cut(sizes: Sizes, has_bias: bool, stand_in: list[Sizes]) -> None:
    sparse, dense = pruned(sizes.rows, sizes.depth), torch.randn(sizes.lanes, sizes.depth)
    bias = torch.randn(sizes.rows) if has_bias else None
    result = sparse_product(Product("call", sparse, dense, bias))
    assert result is not None and result.is_contiguous()
    torch.testing.assert_close(result, F.linear(dense, sparse, bias))
    assert set(stand_in) == {padded(sizes)}


def test_a_wrong_algorithm_is_never_taken(stand_in: list[Sizes]) -> None:
    sparse, dense = pruned(16, 16), torch.randn(8, 16)

    def exact() -> Tensor:
        return dense @ sparse.t()

    assert best_algorithm(sparse, dense, None, exact) == RIGHT
    before = len(stand_in)
    assert best_algorithm(sparse, dense, None, exact) == RIGHT
    assert len(stand_in) == before, "searched again"


def test_the_search_heeds_determinism_and_capture(stand_in: list[Sizes], monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, dense = pruned(16, 16), torch.randn(8, 16)
    monkeypatch.setattr(library, "_time", lambda run: pytest.fail("a clock decides"))
    torch.use_deterministic_algorithms(True)
    try:
        assert best_algorithm(sparse, dense, None, lambda: dense @ sparse.t()) == RIGHT
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert best_algorithm(sparse, dense, None, lambda: pytest.fail("searched")) is None


def test_where_every_algorithm_is_wrong_the_dense_kernel_runs(
    stand_in: list[Sizes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_right_algorithms", lambda *_: iter(()))
    product_ = Product("wrong", pruned(16, 16), torch.randn(8, 16))
    dense = product_.dense @ product_.sparse.t()
    assert run_product(product_, lambda rows: rows, lambda: dense) is dense
    choice = choices.latest("wrong")
    assert choice is not None and choice.kernel == "dense"


def layers() -> list[tuple[nn.Module, Tensor]]:
    return [
        (nn.Linear(20, 12), torch.randn(3, 5, 20)),
        (nn.Linear(16, 32, bias=False), torch.randn(7, 16)),
        (nn.Conv2d(8, 16, 1), torch.randn(2, 8, 3, 5)),
        (nn.Conv2d(8, 16, 1, bias=False), torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)),
        (nn.Conv1d(8, 16, 1), torch.randn(2, 8, 5)),
    ]


@pytest.mark.parametrize("index", range(5))
def test_a_layer_trains_as_with_the_reference_backend(index: int, stand_in: list[Sizes]) -> None:
    torch.manual_seed(0)
    layer, x = layers()[index]
    results: list[list[Tensor]] = []
    for backend in ("cusparselt", "reference"):
        compiled = nmcompile.compile(layer, "t-weights", config=CompileConfig(ends="sparse"), backend=backend)
        leaf = x.detach().requires_grad_()
        y = compiled(leaf)
        gradients = torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])
        results.append([y, *gradients])
        if backend == "cusparselt":
            kernels = nmcompile.inspect(compiled).layer("").kernels
            assert "gemm: cusparselt" in kernels[Phase.FORWARD] and "gemm: cusparselt" in kernels[Phase.BACKWARD]
            assert "gemm: reference" in kernels[Phase.UPDATE]
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
    ],
)
def test_refusals(layer: nn.Module, mode: str, words: str, stand_in: list[Sizes]) -> None:
    compiled = nmcompile.compile(layer, mode, config=CompileConfig(ends="sparse"), backend="cusparselt")
    graph = nmcompile.inspect(compiled).layer("").graphs[Phase.FORWARD]
    refusals = [node.meta["refusals"]["cusparselt"] for node in graph.graph.nodes if node.meta.get("refusals")]
    assert any(words in refusal for refusal in refusals)


def test_other_devices_and_dtypes_run_dense_and_say_so() -> None:
    assert "on cpu" in support.operand_refusal(torch.ones(2, dtype=torch.float16))
    meta = torch.ones(2, device="meta")
    x, w = torch.randn(4, 8), pruned(8, 8)
    assert torch.equal(linear_forward(x, w, None, False, "on cpu"), F.linear(x, w))
    assert "meta" in support.operand_refusal(meta)
    choice = choices.latest("on cpu")
    assert choice is not None and choice.kernel == "dense" and "not on cuda" in choice.reason


CHECKS = "test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fakes_and_schemas(layout: torch.memory_format, stand_in: list[Sizes]) -> None:
    x, w, b, dy = torch.randn(3, 5, 8), pruned(12, 8), torch.randn(12), torch.randn(3, 5, 12)
    for transposed in (False, True):
        weight = w.t().contiguous() if transposed else w
        torch.library.opcheck(linear_forward, (x, weight, b, transposed, "a"), test_utils=CHECKS)
        other = pruned(12, 8, dim=0).t().contiguous() if transposed else pruned(12, 8, dim=0)
        torch.library.opcheck(linear_input_gradient, (dy, other, transposed, "b"), test_utils=CHECKS)
    x, dy = (torch.randn(2, c, 3, 4).contiguous(memory_format=layout) for c in (8, 12))
    torch.library.opcheck(pointwise_forward, (x, pruned(12, 8, 1, 1), b, "c"), test_utils=CHECKS)
    weight = pruned(12, 8, 1, 1, dim=0)
    torch.library.opcheck(pointwise_input_gradient, (dy, weight, x, "d"), test_utils=CHECKS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [Sizes(128, 64, 32), Sizes(20, 40, 3), Sizes(1024, 4096, 2048)])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_the_library_multiplies(sizes: Sizes, dtype: torch.dtype, device: str) -> None:
    sparse = pruned(sizes.rows, sizes.depth).to(device, dtype)
    dense = torch.randn(sizes.lanes, sizes.depth, device=device, dtype=dtype)
    bias = torch.randn(sizes.rows, device=device, dtype=dtype)
    result = sparse_product(Product("gpu", sparse, dense, bias))
    exact = F.linear(dense.double(), sparse.double(), bias.double())
    assert result is not None
    assert float((result.double() - exact).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps
