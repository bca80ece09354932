"""Products with a sparse operand and the search for an algorithm, by a library that PyTorch computes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nmcompile import NMPattern
from nmcompile.backends.cusparselt.algorithms import SPLITS, best_algorithm
from nmcompile.backends.cusparselt.gemm_call import GemmCall, run_call
from nmcompile.backends.cusparselt.operand import Operand
from nmcompile.backends.cusparselt.plans import Problem
from nmcompile.backends.cusparselt.product import Product
from nmcompile.backends.cusparselt.support import Sizes, padded
from nmcompile.pruning import OPERATORS
from tests.backends.fake_cusparselt import RIGHT, FakeLibrary, compress_in_rows, pruned

PROBLEM = Problem(64, 64, 8, False, False, True, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("by_depth", [True, False])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("sizes", [Sizes(64, 64, 8), Sizes(20, 8, 3), Sizes(64, 100, 17), Sizes(4, 4, 1)])
def test_products_are_padded_and_cut(
    sizes: Sizes, dim: int, by_rows: bool, by_depth: bool, library: FakeLibrary
) -> None:
    shape = (sizes.rows, sizes.depth) if dim == 1 else (sizes.depth, sizes.rows)
    sparse, dense = pruned(*shape, dim=dim), torch.randn(sizes.lanes, sizes.depth)
    bias = torch.randn(sizes.rows)
    given = dense.t().contiguous() if by_depth else dense
    result = Product(library, Operand(sparse, dim), given, bias, by_depth, by_rows).multiply()
    assert result is not None and result.is_contiguous()
    expected = F.linear(dense, sparse.t() if dim == 0 else sparse, bias)
    torch.testing.assert_close(result, expected.t() if by_rows else expected)
    assert set(library.functions.sizes) == {padded(sizes)}


def test_an_operand_is_masked_and_pruned() -> None:
    matrix, mask, key = torch.randn(16, 12), torch.rand(16, 12) < 0.5, torch.tensor(7)
    masked = Operand(matrix, 0, mask, "mvue", NMPattern(1, 2), key).pruned()
    assert torch.equal(masked, OPERATORS["mvue"].prune(torch.where(mask, matrix, 0.0), "1:2", 0, key))
    assert torch.equal(Operand(matrix, 0, mask).pruned(), matrix * mask)


def test_a_wrong_algorithm_is_never_taken(library: FakeLibrary) -> None:
    assert best_algorithm(library, PROBLEM) == RIGHT
    before = len(library.functions.calls)
    assert best_algorithm(library, PROBLEM) == RIGHT
    assert len(library.functions.calls) == before, "searched again"


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_what_a_layer_multiplies_first_has_no_say(value: float, library: FakeLibrary) -> None:
    """Zeros would make every algorithm look right, and a NaN none."""
    Product(library, Operand(pruned(64, 64), 1), torch.full((8, 64), value)).multiply()
    assert best_algorithm(library, PROBLEM._replace(has_bias=False)) == RIGHT


def test_the_search_heeds_determinism(library: FakeLibrary) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert best_algorithm(library, PROBLEM) == RIGHT
    finally:
        torch.use_deterministic_algorithms(False)
    tried = RIGHT.id * len(SPLITS) + SPLITS.index(RIGHT.split_k) + 1
    assert len(library.functions.sizes) == tried, "a clock decides"


def test_nothing_is_searched_while_a_graph_is_captured(library: FakeLibrary) -> None:
    library.capturing = True
    assert best_algorithm(library, PROBLEM) is None and not library.functions.calls
    library.capturing = False
    assert best_algorithm(library, PROBLEM) == RIGHT


def out_of_memory(library: FakeLibrary) -> None:
    def compress(matrix: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    library.functions.order = compress


def refused(library: FakeLibrary) -> None:
    library.functions.refused.add("cusparseLtMatmulAlgGetAttribute")


@pytest.mark.parametrize("make_fail", [out_of_memory, refused])
def test_a_search_that_fails_leaves_the_dense_kernel(
    make_fail: Callable[[FakeLibrary], None], library: FakeLibrary
) -> None:
    make_fail(library)
    assert best_algorithm(library, PROBLEM) is None
    library.functions.order = compress_in_rows
    library.functions.refused.clear()
    assert best_algorithm(library, PROBLEM) is None, "searched in every call"
    assert best_algorithm(library, PROBLEM._replace(lanes=16)) == RIGHT


def test_where_every_algorithm_is_wrong_the_dense_kernel_runs(library: FakeLibrary) -> None:
    library.functions.right = None
    dense = torch.ones(3)

    def call(sparse: Tensor, x: Tensor, _: Tensor | None) -> GemmCall[Tensor]:
        return GemmCall(Product(library, Operand(sparse, 1), x), lambda rows: rows, lambda: dense)

    result, choice = run_call(call, pruned(64, 64), torch.randn(8, 64))
    assert result is dense and choice.kernel == "dense"
