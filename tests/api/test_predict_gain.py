"""Predicted gains, against the cost models by hand and against the committed measurements."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.api import predict_gain
from nmcompile.api.predict_gain import SCALED
from nmcompile.backends.cpu.cost import costs_here
from nmcompile.backends.cpu.typical_cost import FIT as CPU_FIT
from nmcompile.backends.cusparselt.cost import COPY, DENSE, PACK, PACK_KEPT, SPARSE, GpuCosts
from nmcompile.backends.cusparselt.cost import FIT as GPU_FIT
from nmcompile.backends.cusparselt.support import Sizes
from nmcompile.ir.prediction import Prediction
from nmcompile.native import MISSING

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WIDE, TOKENS = 4096, 8192


def predictions(model: nn.Module, mode: str, **options: Any) -> dict[str, Prediction]:
    report = nmcompile.analyze(model, mode, predict=True, **options)
    return {one.machine: one for one in report.predictions}


def test_a_wide_layer_on_an_h200_is_the_sum_of_its_terms() -> None:
    """By hand: the first layer computes no gradient of its input; W is masked and packed, dY pruned and packed."""
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(WIDE, WIDE, bias=False)), torch.empty(TOKENS, WIDE)
    found = predictions(model, "training", args=(x,), config=CompileConfig(ends="sparse"))["H200, bfloat16"]
    forward, update = Sizes(WIDE, WIDE, TOKENS), Sizes(WIDE, TOKENS, WIDE)
    assert found.dense == pytest.approx(DENSE.seconds(forward) + DENSE.seconds(update))
    weight, gradient = COPY.seconds(WIDE * WIDE, 2), COPY.seconds(TOKENS * WIDE, 2)
    sparse = SPARSE.seconds(forward) + PACK_KEPT * weight + SPARSE.seconds(update) + PACK["mvue 2:4"] * gradient
    assert found.pruned == pytest.approx(sparse, rel=0.02) and 1 < found.gain < 2


def test_other_gpus_are_scaled_by_their_data_sheets() -> None:
    sheet = SCALED["A100 80 GB SXM"]
    model = GpuCosts().scaled(989 / sheet.tflops, 4.8 / sheet.bandwidth)
    assert model.dense.multiplication == pytest.approx(DENSE.multiplication * 989 / 312)
    assert model.sparse.multiplication / model.dense.multiplication == pytest.approx(
        SPARSE.multiplication / DENSE.multiplication
    )
    assert model.copy.byte == pytest.approx(COPY.byte * 4.8 / 2.039) and model.copy.call == COPY.call
    model_, x = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), torch.randn(8, 256)
    found = predictions(model_, "training", args=(x,))
    assert {name for name, one in found.items() if "not measured" in one.basis} == {f"{n}, bfloat16" for n in SCALED}


@pytest.mark.parametrize(("name", "told"), [("fit_cpu_cost", CPU_FIT), ("fit_gpu_cost", GPU_FIT)])
def test_the_stated_error_is_that_of_the_committed_measurements(
    name: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        importlib.import_module(name).main()
    (line,) = re.findall(r"choices are right; (.*)", capsys.readouterr().out)
    assert line == told


def test_only_known_layers_are_predicted() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert predictions(model, "training") == {}
    assert predictions(model, "inference", args=(torch.randn(4, 64),), config=CompileConfig(ends="sparse")) == {}


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_this_cpu_is_predicted_by_its_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)).eval(), torch.randn(256, 512)
    costs = costs_here(torch.get_num_threads())

    def predicted(factor: float) -> Prediction:
        slower = costs._replace(linear=costs.linear * factor, read=costs.read * factor)
        monkeypatch.setattr(predict_gain, "costs_here", lambda threads: slower)
        ((name, found), *_) = predictions(model, "weights", args=(x,)).items()
        assert name.startswith("this CPU")
        return found

    one, twice = predicted(1.0), predicted(2.0)
    products = one.dense - 2 * 2e-5  # without the calls of two layers
    assert twice.dense == pytest.approx(2 * products + 2 * 2e-5)


def test_reports_tell_predictions_in_every_form() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(8, 64)
    report = nmcompile.analyze(model, args=(x,), predict=True)
    data = json.loads(report.to_json())["predictions"]
    assert [one["machine"] for one in data] == [one.machine for one in report.predictions]
    for one in report.predictions:
        for text in (str(report), report.full(), report.to_markdown()):
            assert f"{one.gain:.2f} × on" in text
    assert max(map(len, str(report).splitlines())) <= 100
    assert not nmcompile.analyze(model, args=(x,)).predictions
