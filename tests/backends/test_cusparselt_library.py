"""Plans, with a library that accepts and notes every call: how they are made, destroyed and shared."""

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch

from nmcompile.backends.cusparselt import library
from nmcompile.backends.cusparselt.library import Algorithm, Plan, Problem, kept_plan
from nmcompile.errors import LibraryError

PROBLEM = Problem(64, 64, 8, False, False, True, torch.bfloat16, torch.device("cpu"))


class Noted:
    """A library that notes the names of the calls; those in `refused` fail."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refused: set[str] = set()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*_: Any) -> Any:
            if name == "cusparseLtGetErrorString":
                return b"no"
            self.calls.append(name.removeprefix("cusparseLt"))
            return int(name in self.refused)

        return call


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    found = Noted()
    monkeypatch.setattr(library, "_library", lambda: found)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    library._plans.cache_clear()
    library._handle.cache_clear()
    return found


def test_a_plan_is_destroyed_before_what_it_was_made_from(noted: Noted) -> None:
    plan = Plan(PROBLEM, Algorithm(3, 1))
    assert "MatmulPlanInit" in noted.calls and "MatmulAlgSetAttribute" in noted.calls
    noted.calls.clear()
    del plan
    gc.collect()
    assert noted.calls == ["MatmulPlanDestroy", "MatmulAlgSelectionDestroy", *3 * ["MatDescriptorDestroy"]]


def test_a_refused_algorithm_says_so_and_leaves_nothing(noted: Noted) -> None:
    noted.refused.add("cusparseLtMatmulPlanInit")
    with pytest.raises(LibraryError, match=r"cusparseLtMatmulPlanInit .* failed with 1 \(no\)"):
        Plan(PROBLEM, Algorithm(3, 1))
    gc.collect()
    assert noted.calls.count("MatDescriptorDestroy") == 3 and "MatmulPlanDestroy" not in noted.calls


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_product_has_the_problem_s_shape_and_copies_its_bias(by_rows: bool, noted: Noted) -> None:
    plan = Plan(PROBLEM._replace(by_rows=by_rows), Algorithm(3, 2))
    compressed, dense = torch.zeros(8, dtype=torch.uint8), torch.randn(8, 64, dtype=torch.bfloat16)
    bias = torch.randn(64, dtype=torch.bfloat16)
    result = plan.run(compressed, dense, bias, 0)
    assert result.shape == ((64, 8) if by_rows else (8, 64)) and result.dtype == torch.bfloat16
    assert noted.calls[-1] == "Matmul" and plan.bias is not None and torch.equal(plan.bias, bias)


def test_threads_that_share_a_plan_have_their_own_bias(noted: Noted) -> None:
    plan, found = Plan(PROBLEM, Algorithm(3, 1)), []
    meeting = threading.Barrier(2)

    def multiply(*_: Any) -> int:
        assert plan.bias is not None
        before = float(plan.bias[0])
        with suppress(threading.BrokenBarrierError):
            meeting.wait(0.2)  # the library's time: does the other thread come in meanwhile?
        found.append(before == float(plan.bias[0]))
        return 0

    noted.__dict__["cusparseLtMatmul"] = multiply
    dense = torch.randn(8, 64, dtype=torch.bfloat16)

    def run(value: float) -> None:
        plan.run(torch.zeros(8, dtype=torch.uint8), dense, torch.full((64,), value, dtype=torch.bfloat16), 0)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [1.0, 2.0]))
    del noted.__dict__["cusparseLtMatmul"]  # which holds the plan
    assert found == [True, True] and meeting.broken, "both were inside at the same time"


def test_a_plan_made_in_inference_mode_serves_outside(noted: Noted) -> None:
    with torch.inference_mode():
        plan = Plan(PROBLEM, Algorithm(3, 1))
    dense = torch.randn(8, 64, dtype=torch.bfloat16)
    plan.run(torch.zeros(8, dtype=torch.uint8), dense, torch.ones(64, dtype=torch.bfloat16), 0)
    assert plan.bias is not None and bool((plan.bias == 1).all())


def test_each_stream_has_a_plan_and_a_graph_takes_one_that_is_there(
    noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = Algorithm(3, 1)
    monkeypatch.setattr(library, "is_capturing", lambda _: True)
    captured: set[Plan] = set()
    monkeypatch.setattr(library, "_captured", captured)
    assert kept_plan(PROBLEM, algorithm, 1) is None
    monkeypatch.setattr(library, "is_capturing", lambda _: False)
    first, second = kept_plan(PROBLEM, algorithm, 1), kept_plan(PROBLEM, algorithm, 2)
    assert first is not second and first is kept_plan(PROBLEM, algorithm, 1)
    monkeypatch.setattr(library, "is_capturing", lambda _: True)
    made = len(noted.calls)
    assert kept_plan(PROBLEM, algorithm, 2) is second and kept_plan(PROBLEM, algorithm, 3) is first
    assert kept_plan(PROBLEM, algorithm, 3) is first
    assert captured == {second, first} and len(noted.calls) == made


def test_the_version_is_that_of_what_is_loaded(noted: Noted) -> None:
    assert library.library_version() == (0, 0, 0)
    noted.refused.add("cusparseLtGetProperty")
    with pytest.raises(LibraryError):
        library.library_version()
