"""The cost model of the GPU against the measurements that it was fitted to."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from nmcompile.backends.cusparselt import cost
from nmcompile.backends.cusparselt.cost import COPY, DENSE, MASK, PACK, PACK_KEPT, PRUNE, SPARSE, predicted_speedup
from nmcompile.backends.cusparselt.operand import Operand
from nmcompile.backends.cusparselt.support import Sizes
from nmcompile.pruning.pattern import NMPattern

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("fit_gpu_cost")


def test_the_constants_are_those_of_the_fit(fit: Any) -> None:
    dense, sparse = fit.fitted_products(fit.measured())
    for constants, fitted in ((DENSE, dense), (SPARSE, sparse), (COPY, fit.fitted_copy())):
        assert tuple(constants) == pytest.approx(tuple(fitted), rel=1e-3)


def test_the_model_chooses_nearly_as_well_as_the_clock(fit: Any) -> None:
    rows = fit.measured()
    chosen = dict(zip(rows, fit.choices(rows, DENSE, SPARSE), strict=True))
    assert len(rows) == 40 and sum(chosen[row] == (row.speedup > 1) for row in rows) >= 37
    best = fit.mean_speedup(rows, lambda row: row.speedup > 1)
    assert fit.mean_speedup(rows, chosen.__getitem__) > 0.99 * best > fit.mean_speedup(rows, lambda row: True)


def test_passes_cost_what_was_measured(fit: Any) -> None:
    gradient, _, weight = (row["copies"] for row in fit.read("gpu_pruning.json"))
    names = {"mvue 1:2": "MVUE 1:2", "mvue 2:4": "MVUE 2:4", "mvue_approx 2:4": "approx-MVUE 2:4"}
    for rule, copies in PRUNE.items():
        assert copies == pytest.approx(gradient[f"{names[rule]}, dense"], abs=0.05)
    packed = {"mvue 2:4": "MVUE 2:4, packed for cuSPARSELt", "greedy 2:4": "greedy 2:4, packed"}
    packed["mvue_approx 2:4"] = "approx-MVUE 2:4, packed"
    for rule, copies in PACK.items():
        assert copies == pytest.approx(gradient[packed[rule]], abs=0.05)
    assert pytest.approx(weight["masked and packed for cuSPARSELt, both directions"], abs=0.05) == 2 * PACK_KEPT
    assert MASK == (2 + 1 + 2) / 4, "reads two bytes and one of the mask, and writes two"


def test_a_prediction_counts_the_preparation_of_the_operand() -> None:
    sizes, matrix = Sizes(4096, 4096, 8192), torch.empty(4096, 4096, dtype=torch.bfloat16)
    product = DENSE.seconds(sizes) / SPARSE.seconds(sizes)
    mask = torch.empty(4096, 4096, dtype=torch.bool)
    assert predicted_speedup(sizes, Operand(matrix, 1, mask), is_cached=True) == pytest.approx(product)
    masked, pruned = (predicted_speedup(sizes, Operand(matrix, 1, one), False) for one in (mask, None))
    assert pruned is not None and masked is not None and pruned < masked < product
    drawn = Operand(matrix, 0, None, "mvue", NMPattern(1, 2))
    assert predicted_speedup(sizes, drawn, False) == pytest.approx(
        (DENSE.seconds(sizes) + 2.8 * COPY.seconds(2**24, 2)) / (SPARSE.seconds(sizes) + 3.86 * COPY.seconds(2**24, 2))
    )
    assert predicted_speedup(sizes, Operand(matrix.float(), 1), False) is None


def test_an_operator_that_was_not_measured_costs_a_copy_at_least() -> None:
    assert cost._copies("biased 2:4", for_sparse=False, is_fused=True) == cost.LEAST
