"""However much is asked of `compile`, the model goes one way, and `analyze` looks along the same one."""

from dataclasses import FrozenInstanceError
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn

import nmcompile
from nmcompile import CompileConfig, Phase
from nmcompile.api import compile as compiling
from nmcompile.api import request as requesting
from nmcompile.api.request import Request
from nmcompile.capture import capture_model
from nmcompile.ir.captured import Captured

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
PAYS = CompileConfig(where="pays", ends="sparse")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Return the list of requests that are rewritten, which grows; the forward GEMM of the first layer never pays."""
    seen: list[Request] = []
    rewrite = compiling.rewrite

    def noted(request: Request, *rest: Any) -> nn.Module:
        seen.append(request)
        return rewrite(request, *rest)

    def found(trial: nn.Module, *_: Any) -> dict[str, dict[Phase, str]]:
        return {"0": {Phase.FORWARD: "slow"}}

    monkeypatch.setattr(compiling, "rewrite", noted)
    monkeypatch.setattr(compiling, "find_dense_phases", found)
    monkeypatch.setattr("nmcompile.api.whole_step.step_times", lambda *_: (1.0, 1.0))
    return seen


def score(model: nn.Module) -> float:
    """Return the score of the dense model if layer "2" is dense, else a worse one."""
    return float("2" not in {layer.layer.name for layer in nmcompile.inspect(model).program.plan if layer.rewritten})


def test_calibration_validation_and_pays_refine_one_request(
    requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, captures = net(), list[nn.Module]()

    def captured(model: nn.Module, *example: Any) -> Captured:
        captures.append(model)
        return capture_model(model, *example)

    monkeypatch.setattr(requesting, "capture_model", captured)

    def validation(one: nn.Module) -> float:
        return score(one) if nmcompile.is_compiled(one) else 1.0

    compiled = nmcompile.compile(
        model, "inference", args=(X,), config=PAYS, calibration=[X], validation=validation, max_drop=0.5
    )
    first, *trials, last = requests
    assert captures == [model]
    assert not first.earlier.steps and first.reverted is None and first.dense_phases is None
    assert all(step.is_calibrated for one in (*trials, last) for step in one.earlier.steps.values())
    assert [set(one.config.layers) for one in trials] == [set(), set(), {"0"}, {"2"}, {"4"}, {"2"}, {"2"}]
    assert last.reverted is not None and last.reverted.layers == ("2",)
    assert last.dense_phases == {"0": {Phase.FORWARD: "slow"}}
    report = nmcompile.inspect(compiled)
    assert report.reverted == last.reverted
    assert not report.layer("2").plan.rewritten and report.layer("4").plan.rewritten
    assert "slow" in {row.reason for row in report.layer("0").plan.rows_of(Phase.FORWARD)}


def test_analyze_takes_the_same_steps(requests: list[Request]) -> None:
    model = net()
    planned = nmcompile.analyze(model, "training", args=(X,), config=PAYS).program.plan
    assert len(requests) == 1
    compiled = nmcompile.compile(model, "training", args=(X,), config=PAYS)
    assert nmcompile.inspect(compiled).program.plan == planned


def test_nothing_but_the_last_step_writes_to_the_model() -> None:
    """With `inplace` too, as trials are copies."""
    model, classes = net().train(), list[type]()

    def validation(one: nn.Module) -> float:
        classes.extend(type(module) for module in model.modules())
        return 0.0

    config = CompileConfig(where="pays", ends="sparse")
    compiled = nmcompile.compile(
        model, "inference", args=(X,), config=config, calibration=[X], validation=validation, max_drop=1, inplace=True
    )
    assert compiled is model and nmcompile.is_compiled(model) and model.training
    assert set(classes) == {nn.Sequential, nn.Linear, nn.ReLU}


def test_a_request_is_not_changed() -> None:
    request = requesting.request_of(net(), "weights", (X,), None, None, "auto")
    with pytest.raises(FrozenInstanceError):
        request.mode = "dense"  # type: ignore[misc]
    assert request.without(["0"]).config.layers == {"0": None} and not request.config.layers


def test_a_trial_says_nothing_of_what_the_model_carried(requests: list[Request]) -> None:
    nmcompile.compile(net(), "inference", args=(X,), config=PAYS, calibration=[X])
    assert requests[-1].earlier.masks and not requests[-1].earlier.carried
    requests.clear()
    masked = nmcompile.compile(net(), "weights", args=(X,))
    masked(X)
    nmcompile.compile(masked, "inference", args=(X,), calibration=[X])
    assert {name: set(fields) for name, fields in requests[-1].earlier.carried.items()} == {"2.weight": {"weight"}}


@pytest.mark.parametrize(
    "name", ["analyze", "calibrate", "compare", "compile", "decompile", "export", "inspect", "is_compiled", "verify"]
)
def test_public_verbs_are_functions_beside_modules_of_the_same_name(name: str) -> None:
    assert isinstance(getattr(nmcompile, name), FunctionType)
