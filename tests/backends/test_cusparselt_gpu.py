"""Tests of cuSPARSELt on a GPU: the library is right, and a step or a CUDA graph runs without waiting."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.cusparselt.kept_weights import kept_for
from nmcompile.backends.cusparselt.library import CUSPARSELT
from nmcompile.backends.cusparselt.operand import Operand, checked_layout
from nmcompile.backends.cusparselt.product import Product
from nmcompile.backends.cusparselt.support import Sizes, operand_refusal
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.ir.choice import Choice
from nmcompile.pruning import OPERATORS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUSPARSELT.support().ok, reason=CUSPARSELT.support().reason),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("by_depth", [False, True])
@pytest.mark.parametrize("sizes", [Sizes(128, 64, 32), Sizes(20, 40, 3), Sizes(1024, 4096, 2048)])
def test_the_library_multiplies(sizes: Sizes, by_depth: bool, dim: int, dtype: torch.dtype) -> None:
    shape = (sizes.rows, sizes.depth) if dim == 1 else (sizes.depth, sizes.rows)
    matrix = torch.randn(shape, device="cuda", dtype=dtype)
    if refusal := operand_refusal(CUSPARSELT, matrix):
        pytest.skip(refusal)
    mask = OPERATORS["greedy"].prune(matrix, "2:4", dim, None) != 0
    dense = torch.randn(sizes.lanes, sizes.depth, device="cuda", dtype=dtype)
    bias = torch.randn(sizes.rows, device="cuda", dtype=dtype)
    given = dense.t().contiguous() if by_depth else dense
    result = Product(CUSPARSELT, Operand(matrix, dim, mask), given, bias, by_depth).multiply()
    lines = torch.where(mask, matrix, 0.0).movedim(dim, 1)
    exact = F.linear(dense.double(), lines.double(), bias.double())
    assert result is not None
    assert float((result.double() - exact).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 64), (128, 192), (1024, 4096)])
def test_our_kernel_compresses_as_the_library_does(size: tuple[int, int], dtype: torch.dtype) -> None:
    assert checked_layout(CUSPARSELT, *size, dtype, torch.device("cuda", 0)) is not None


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Force the sparse kernels to run, however long they take."""
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    return torch.device("cuda", 0)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_layer_trains_on_the_gpu_as_with_the_reference_backend(is_compiled: bool, on_gpu: torch.device) -> None:
    layer = nn.Linear(256, 512).to(on_gpu, torch.bfloat16)
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


def test_a_layer_at_rest_is_captured_in_a_graph(on_gpu: torch.device) -> None:
    layer = nn.Linear(256, 512).to(on_gpu, torch.bfloat16)
    compiled = nmcompile.compile(layer, "weights", config=CompileConfig(ends="sparse"))
    x = torch.randn(64, 256, device=on_gpu, dtype=torch.bfloat16)
    nmcompile.freeze(compiled)
    with torch.no_grad():
        compiled(x)
        assert len(kept_for(CUSPARSELT).forms["sparse"]) == 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = compiled(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, compiled(x))


def test_on_a_gpu_nothing_is_cached_of_a_model_that_is_not_frozen(on_gpu: torch.device) -> None:
    layer = nn.Linear(256, 512).to(on_gpu, torch.bfloat16)
    compiled = nmcompile.compile(layer, "weights", config=CompileConfig(ends="sparse"))
    x = torch.randn(64, 256, device=on_gpu, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled(x)
        layer.weight.data.copy_(torch.randn_like(layer.weight))
        torch.testing.assert_close(compiled(x), nmcompile.finalize(compiled)(x))
    assert len(kept_for(CUSPARSELT).forms["sparse"]) == 0


def test_a_step_never_waits_for_the_gpu(on_gpu: torch.device) -> None:
    layer = nn.Linear(256, 512).to(on_gpu, torch.bfloat16)
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
