"""Plans, with a library that PyTorch computes: how they are made, destroyed and shared; and how a library is found."""

import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nmcompile.backends.cusparselt import plans
from nmcompile.backends.cusparselt.compress import compress
from nmcompile.backends.cusparselt.library import CUSPARSELT, library_named
from nmcompile.backends.cusparselt.plans import Algorithm, Plan, Problem, kept_plan
from nmcompile.errors import LibraryError
from tests.backends.fake_cusparselt import RIGHT, FakeLibrary, pruned

PROBLEM = Problem(64, 64, 8, False, False, True, torch.bfloat16, torch.device("cpu"))


def test_a_plan_is_destroyed_before_what_it_was_made_from(library: FakeLibrary) -> None:
    functions, plan = library.functions, Plan(library, PROBLEM, Algorithm(3, 1))
    assert "MatmulPlanInit" in functions.calls and "MatmulAlgSetAttribute" in functions.calls
    functions.calls.clear()
    del plan
    gc.collect()
    assert functions.calls == ["MatmulPlanDestroy", "MatmulAlgSelectionDestroy", *3 * ["MatDescriptorDestroy"]]


def test_a_refused_algorithm_says_so_and_leaves_nothing(library: FakeLibrary) -> None:
    functions = library.functions
    functions.refused.add("cusparseLtMatmulPlanInit")
    with pytest.raises(LibraryError, match=r"cusparseLtMatmulPlanInit .* failed with 1 \(no\)"):
        Plan(library, PROBLEM, Algorithm(3, 1))
    gc.collect()
    assert functions.calls.count("MatDescriptorDestroy") == 3 and "MatmulPlanDestroy" not in functions.calls


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("by_depth", [False, True])
def test_a_product_has_the_problem_s_shape_and_bias(by_depth: bool, by_rows: bool, library: FakeLibrary) -> None:
    plan = Plan(library, PROBLEM._replace(by_depth=by_depth, by_rows=by_rows), RIGHT)
    sparse, dense, bias = (x.bfloat16() for x in (pruned(64, 64), torch.randn(8, 64), torch.randn(64)))
    result = plan.run(compress(library, sparse), dense.t().contiguous() if by_depth else dense, bias)
    expected = F.linear(dense.float(), sparse.float(), bias.float()).bfloat16()
    torch.testing.assert_close(result, expected.t() if by_rows else expected, rtol=0, atol=0)


def test_threads_that_share_a_plan_have_their_own_bias(library: FakeLibrary) -> None:
    plan, found = Plan(library, PROBLEM, Algorithm(3, 1)), []
    meeting = threading.Barrier(2)

    def multiply(*_: Any) -> int:
        assert plan.bias is not None
        before = float(plan.bias[0])
        with suppress(threading.BrokenBarrierError):
            meeting.wait(0.2)  # the library's time: does the other thread come in meanwhile?
        found.append(before == float(plan.bias[0]))
        return 0

    library.functions.cusparseLtMatmul = multiply  # type: ignore[assignment]
    dense = torch.randn(8, 64, dtype=torch.bfloat16)

    def run(value: float) -> None:
        plan.run(torch.zeros(8, dtype=torch.uint8), dense, torch.full((64,), value, dtype=torch.bfloat16))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [1.0, 2.0]))
    assert found == [True, True] and meeting.broken, "both were inside at the same time"


def test_a_plan_made_in_inference_mode_serves_outside(library: FakeLibrary) -> None:
    with torch.inference_mode():
        plan = Plan(library, PROBLEM, RIGHT)
    compressed, dense = compress(library, pruned(64, 64).bfloat16()), torch.randn(8, 64, dtype=torch.bfloat16)
    plan.run(compressed, dense, torch.ones(64, dtype=torch.bfloat16))
    assert plan.bias is not None and bool((plan.bias == 1).all())


def test_each_stream_has_a_plan_and_a_graph_takes_one_that_is_there(library: FakeLibrary) -> None:
    def plan_on(stream: int) -> Plan | None:
        library.current_stream = stream
        return kept_plan(library, PROBLEM, RIGHT)

    library.capturing = True
    assert plan_on(1) is None
    library.capturing = False
    first, second = plan_on(1), plan_on(2)
    assert first is not second and first is plan_on(1)
    library.capturing = True
    made = len(library.functions.calls)
    assert plan_on(2) is second and plan_on(3) is first and plan_on(3) is first
    assert {first, second} <= plans._captured and len(library.functions.calls) == made


def test_the_version_is_that_of_what_is_loaded(library: FakeLibrary) -> None:
    assert library.version() == (0, 9, 1)
    library.functions.refused.add("cusparseLtGetProperty")
    with pytest.raises(LibraryError):
        library.version()


def test_a_library_is_found_while_somebody_has_it(library: FakeLibrary) -> None:
    assert library_named(library.name) is library
    assert all(pickle.loads(pickle.dumps(one)) is one for one in (library, CUSPARSELT))
    name = FakeLibrary().name
    gc.collect()
    with pytest.raises(LibraryError, match="is gone"):
        library_named(name)
