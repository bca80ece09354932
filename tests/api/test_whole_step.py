"""`where="pays"`: the whole step decides at the end, and leaves no trace in the model."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, Phase
from nmcompile.api import measure_phases, whole_step
from nmcompile.api.choose_phases import Parts
from nmcompile.api.layer_steps import Steps
from nmcompile.api.whole_step import SLOWER, all_dense
from nmcompile.backends.shared.timing import Call, Turns, medians_in_turns

CONFIG = CompileConfig(where="pays", ends="sparse")
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 8), nn.Linear(8, 4))


@pytest.fixture(autouse=True)
def layers_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every layer gain most with everything pruned, except that one of 8 inputs gains nothing."""

    def timed(steps: Steps, *_: object) -> dict[Parts, float]:
        (example,) = steps[()]()[:1]  # type: ignore[index]
        return {parts: 1.0 if example.shape[-1] == 8 else 1.0 / (1 + len(parts)) for parts in steps}

    monkeypatch.setattr(measure_phases, "medians_in_turns", timed)


def measured(monkeypatch: pytest.MonkeyPatch, pruned: float, dense: float) -> nn.Module:
    """Return a compiled model whose whole step was measured to take these seconds; each step runs once."""

    def timed(steps: dict[str, Call], *_: object) -> dict[str, float]:
        for step in steps.values():
            step()
        return {"pruned": pruned, "dense": dense}

    monkeypatch.setattr(whole_step, "medians_in_turns", timed)
    return nmcompile.compile(net(), args=(X,), config=CONFIG)


def dense_phases(model: nn.Module) -> dict[str, set[Phase]]:
    plans = nmcompile.inspect(model).program.plan
    return {plan.layer.name: {p for p in Phase if not any(r.is_sparse for r in plan.rows_of(p))} for plan in plans}


@pytest.mark.parametrize("pruned", [0.8, 1.0, SLOWER])
def test_a_step_that_is_not_slower_keeps_the_layers_that_gain(pruned: float, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = measured(monkeypatch, pruned, 1.0)
    assert dense_phases(compiled) == {"0": set(), "3": set(), "4": set(Phase)}


def test_a_slower_step_leaves_everything_dense_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = measured(monkeypatch, 1.25e-3, 1e-3)
    assert dense_phases(compiled) == {name: set(Phase) for name in ("0", "3", "4")}
    assert [type(module) for module in compiled.children()][::3] == [nn.Linear, nn.Linear]
    report = nmcompile.inspect(compiled)
    reasons = {row.reason for name in ("0", "3") for row in report.layer(name).plan.rows}
    assert reasons == {"pruning does not pay (where='pays'): the whole step takes 1.25 ms pruned, 1.00 dense"}
    assert all("at best" in row.reason for row in report.layer("4").plan.rows)  # its own reason
    assert torch.equal(nmcompile.sparse_state_dict(compiled)["0.dense_phases"], torch.ones(3, dtype=torch.bool))


def test_nothing_is_timed_if_no_layer_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_phases, "medians_in_turns", lambda steps, *_: dict.fromkeys(steps, 1.0))
    monkeypatch.setattr(whole_step, "step_times", lambda *_: pytest.fail("a whole step was timed"))
    assert dense_phases(nmcompile.compile(net(), args=(X,), config=CONFIG))["0"] == set(Phase)


@pytest.mark.parametrize("training", [True, False])
def test_the_check_changes_nothing(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real steps: tensors, their versions, gradients, hooks and random states stay as they are."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()
            self.count = nn.Buffer(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            y: Tensor = self.body(x.add_(1))
            return y

    monkeypatch.setattr(whole_step, "TURNS", Turns(1, 1, 0.0))
    model, x, hooked, step_times = Writes().train(training), X.clone(), list[Tensor](), whole_step.step_times
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
        parameter.register_hook(hooked.append)
    tensors = {"x": x, **model.state_dict(keep_vars=True)}
    checked: list[bool] = []

    def watched(*args: Any) -> tuple[float, float]:
        before = {name: (tensor.clone(), tensor._version) for name, tensor in tensors.items()}
        random_state = torch.get_rng_state()
        times = step_times(*args)
        assert torch.equal(torch.get_rng_state(), random_state)
        same = [torch.equal(tensor, before[n][0]) and tensor._version == before[n][1] for n, tensor in tensors.items()]
        checked.extend(same)
        return times

    monkeypatch.setattr(whole_step, "step_times", watched)
    compiled = nmcompile.compile(model, args=(x,), config=CONFIG)
    assert checked and all(checked) and not hooked
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())  # type: ignore[union-attr]
    assert all(tensor is tensors[name] for name, tensor in compiled.state_dict(keep_vars=True).items())
    assert all(module.training is training for module in compiled.modules())


class NeedsLabels(nn.Sequential):
    """A model that cannot be trained with the arguments that it can be run with."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise ValueError("labels are missing")
        result: Tensor = super().forward(x)
        return result


def test_a_step_that_fails_warns_and_decides_nothing() -> None:
    with pytest.warns(UserWarning, match=r"whole step could not be timed.*labels are missing; pass args"):
        compiled = nmcompile.compile(NeedsLabels(*net()), args=(X,), config=CONFIG)
    assert dense_phases(compiled)["0"] == set()
    nmcompile.compile(NeedsLabels(*net()).eval(), args=(X,), config=CONFIG)  # a warning would be an error


@dataclass
class Scores:
    """A result that pytree does not open."""

    scores: Tensor
    names: list[str]


class Returns(nn.Module):
    """A model that returns its scores in some structure, beside tensors without gradients."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(16, 4), kind

    def forward(self, x: Tensor) -> object:
        y = self.linear(x)
        made: dict[str, object] = {
            "tensor": y,
            "tuple": (y, y.argmax(-1), None),
            "dict": {"loss": y.square().mean(), "scores": y},
            "dataclass": Scores(y, ["a"]),
            "nothing that is trained": y.detach(),
        }
        return made[self.kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "dataclass"])
def test_a_step_goes_backward_from_any_structure(kind: str) -> None:
    model, x = Returns(kind), X.clone().requires_grad_()
    *gradients, of_input = whole_step.whole_step(model, (x,), {})()
    assert [g.shape for g in gradients if g is not None] == [p.shape for p in model.parameters()]
    assert of_input is not None and of_input.shape == x.shape
    assert all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in (*gradients, of_input))
    assert x.grad is None and all(p.grad is None for p in model.parameters())


def test_a_step_without_gradients_is_the_forward_alone() -> None:
    assert not whole_step.whole_step(Returns("nothing that is trained"), (X,), {})()
    assert not whole_step.whole_step(Returns("tensor").eval(), (), {"x": X})()


def test_outputs_get_the_same_gradients_in_each_step() -> None:
    step = whole_step.whole_step(Returns("tensor"), (X,), {})
    pairs = list(zip(step(), step(), strict=True))
    assert pairs and all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def test_a_phase_that_is_dense_already_keeps_its_reason() -> None:
    optional = {"a": (Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE), "b": (Phase.UPDATE,)}
    chosen = {"a": {Phase.UPDATE: "slow alone"}, "b": {}}
    assert all_dense(optional, chosen, "slow") == {
        "a": {Phase.FORWARD: "slow", Phase.BACKWARD: "slow", Phase.UPDATE: "slow alone"},
        "b": {Phase.UPDATE: "slow"},
    }


@pytest.mark.parametrize(("turns", "calls"), [(Turns(2, 9, 0.0), 3), (Turns(2, 5, 1e9), 6), (Turns(2, 9, 7.5), 5)])
def test_turns_end_when_the_time_is_spent(turns: Turns, calls: int) -> None:
    """Each call takes one second; the first turn is not timed."""
    made: list[str] = []

    def clock(call: Call) -> float:
        call()
        return 1.0

    medians = medians_in_turns({name: partial(made.append, name) for name in "ab"}, clock, turns)
    assert Counter(made) == {"a": calls, "b": calls} and medians == {"a": 1.0, "b": 1.0}


def test_the_reason_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_step, "step_times", lambda *_: (2.0, 1.0))
    report = nmcompile.analyze(net(), args=(X,), config=CONFIG)
    (reason,) = {row.reason for row in report.layer("0").plan.rows}
    assert re.search(r"2000\.00 ms pruned, 1000\.00 dense$", reason)
