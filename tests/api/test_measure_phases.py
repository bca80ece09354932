"""`where="pays"`: decisions from measured times, stored and reported."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig, Phase, Pruning
from nmcompile.api import measure_phases, whole_step
from nmcompile.api.choose_phases import Parts, decide
from nmcompile.api.layer_steps import Steps
from nmcompile.api.measure_phases import MARGIN, NOT_REACHED, VERDICT
from nmcompile.errors import ConfigError, StateError

WEIGHT, UPDATE = (Phase.FORWARD, Phase.BACKWARD), (Phase.UPDATE,)
CONFIG = CompileConfig(where="pays", ends="sparse", refresh=2)
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
Dense = dict[str, set[Phase]]


@pytest.mark.parametrize(
    ("times", "dense"),
    [
        ({(): 1.0, (WEIGHT,): 0.9, (UPDATE,): 0.8, (WEIGHT, UPDATE): 0.7}, set()),
        ({(): 1.0, (WEIGHT,): 1.1, (UPDATE,): 0.8, (WEIGHT, UPDATE): 0.9}, set(WEIGHT)),
        ({(): 1.0, (WEIGHT,): 0.6, (UPDATE,): 1.2, (WEIGHT, UPDATE): 0.8}, set(UPDATE)),
        ({(): 1.0, (WEIGHT,): 1.2, (UPDATE,): 1.1, (WEIGHT, UPDATE): 1.3}, {*WEIGHT, *UPDATE}),
        ({(): 1.0, (WEIGHT,): 0.96}, set(WEIGHT)),  # within the noise
    ],
)
def test_the_fastest_combination_is_kept(times: Mapping[Parts, float], dense: set[Phase]) -> None:
    assert set(decide(times, MARGIN, VERDICT)) == dense


def test_the_reason_holds_the_times() -> None:
    assert decide({(): 1e-3, (UPDATE,): 2e-3}, MARGIN, VERDICT)[Phase.UPDATE].endswith(
        "2.00 ms with everything pruned, 2.00 at best, 1.00 dense"
    )


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 8), nn.Dropout(), nn.Linear(8, 4)
    )


@pytest.fixture
def paying(monkeypatch: pytest.MonkeyPatch) -> dict[int, Parts]:
    """Return which phases pay, by the width of the layer's input; every candidate runs once, whole steps do not."""
    pays: dict[int, Parts] = {16: (WEIGHT,), 8: ()}

    def timed(steps: Steps, *_: object) -> dict[Parts, float]:
        results = {parts: step() for parts, step in steps.items()}
        gradients = results[()]
        assert isinstance(gradients, tuple)
        return {parts: 0.5 if parts == pays[gradients[0].shape[1]] else 1.0 for parts in steps}

    monkeypatch.setattr(measure_phases, "medians_in_turns", timed)
    monkeypatch.setattr(whole_step, "step_times", lambda *_: (1.0, 1.0))
    return pays


def dense_phases(model: nn.Module) -> Dense:
    plans = nmcompile.inspect(model).program.plan
    return {plan.layer.name: {p for p in Phase if not any(r.is_sparse for r in plan.rows_of(p))} for plan in plans}


def test_what_does_not_pay_is_dense_and_a_layer_without_pruning_stays_what_it_was(paying: object) -> None:
    model = net()
    compiled = nmcompile.compile(model, args=(X,), config=CONFIG)
    assert dense_phases(compiled) == {"0": {Phase.UPDATE}, "3": {Phase.UPDATE}, "5": set(Phase)}
    assert type(compiled[5]) is nn.Linear  # type: ignore[index]
    report = nmcompile.inspect(compiled)
    assert "does not pay" in report.layer("5").plan.rows_of(Phase.FORWARD)[0].reason
    compiled(X).sum().backward()
    assert nmcompile.verify(compiled).ok
    assert {check.name for check in nmcompile.verify(compiled).checks} == {"0.weight", "3.weight"}


def test_deciding_changes_neither_the_model_nor_any_random_state(paying: object) -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    compiled = nmcompile.compile(model, args=(X,), config=CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in compiled.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert compiled.training


def test_analyze_decides_too(paying: object) -> None:
    report = nmcompile.analyze(net(), args=(X,), config=CONFIG)
    assert [row.reason[:20] for row in report.layer("3").plan.rows_of(Phase.UPDATE)] == ["pruning does not pay"]


def test_a_saved_decision_holds_where_another_was_measured(paying: dict[int, object]) -> None:
    first = nmcompile.compile(net(), args=(X,), config=CONFIG)
    state = nmcompile.sparse_state_dict(first)
    paying.update({16: (WEIGHT, UPDATE), 8: (UPDATE,)})
    second = nmcompile.compile(net(), args=(X,), config=CONFIG)
    assert dense_phases(second) != dense_phases(first)
    nmcompile.load_sparse_state_dict(second, state)
    assert dense_phases(second) == dense_phases(first)
    assert type(second[5]) is nn.Linear  # type: ignore[index]
    outputs: list[Tensor] = []
    for model in (first.eval(), second.eval()):
        model(X).square().sum().backward()
        outputs.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*outputs)
    assert list(nmcompile.sparse_state_dict(second)) == list(state)


@pytest.mark.parametrize("asked", [True, False])
def test_a_gradient_of_the_input_counts_where_it_is_asked_for(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[int] = []

    def timed(steps: Steps, *_: object) -> dict[Parts, float]:
        for step in steps.values():
            found = step()
            assert isinstance(found, tuple)
            gradients.append(len(found))
        return dict.fromkeys(steps, 1.0)

    monkeypatch.setattr(measure_phases, "medians_in_turns", timed)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4, bias=False))
    nmcompile.compile(model, args=(X.clone().requires_grad_(asked),), config=CONFIG)
    assert set(gradients) == ({3, 2} if asked else {2})


def test_a_model_that_is_dense_throughout_keeps_its_decision(paying: dict[int, object]) -> None:
    paying.update({16: (), 8: ()})
    dense = nmcompile.compile(net(), args=(X,), config=CONFIG)
    state = nmcompile.sparse_state_dict(dense)
    paying.update({16: (WEIGHT,)})
    other = nmcompile.compile(net(), args=(X,), config=CONFIG)
    nmcompile.load_sparse_state_dict(other, state)
    assert dense_phases(other) == {"0": set(Phase), "3": set(Phase), "5": set(Phase)}
    nmcompile.load_sparse_state_dict(dense, state)


def test_a_state_that_does_not_fit_changes_nothing(paying: dict[int, object]) -> None:
    state = nmcompile.sparse_state_dict(nmcompile.compile(net(), args=(X,), config=CONFIG))
    paying.update({8: (WEIGHT,)})
    model = nmcompile.compile(net(), args=(X,), config=CONFIG)
    before = dense_phases(model)
    state["0.weight.mask"] = state["0.weight.mask"][:, :4]
    with pytest.raises(StateError, match=r"0\.weight\.mask"):
        nmcompile.load_sparse_state_dict(model, state)
    assert dense_phases(model) == before
    with pytest.raises(StateError, match="where='pays'"):
        nmcompile.load_sparse_state_dict(nmcompile.compile(net(), config=CompileConfig(ends="sparse")), state)


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_layer_that_args_do_not_reach_is_dense() -> None:
    compiled = nmcompile.compile(Unreached(), args=(X,), config=CONFIG)
    rows = nmcompile.inspect(compiled).layer("unused").plan.rows
    assert {row.reason for row in rows} == {NOT_REACHED}


def test_args_are_needed() -> None:
    with pytest.raises(ConfigError, match="pass args="):
        nmcompile.compile(net(), config=CONFIG)
    with pytest.raises(ConfigError, match="where 'pay' is unknown"):
        CompileConfig(where="pay")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["training", "activations", "weights", "gradients"])
def test_every_kind_of_layer_is_measured(mode: str, training: bool) -> None:
    """With real times: whatever is decided, the model runs, and each phase has a pattern or a reason."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(8 * 16, 8),
    ]
    model = nn.Sequential(*layers).train(training)
    compiled = nmcompile.compile(model, mode, args=(torch.randn(4, 4, 6, 6),), config=CONFIG)
    assert compiled(torch.randn(4, 4, 6, 6)).shape == (4, 8)
    for plan in nmcompile.inspect(compiled).program.plan:
        assert all(any(row.is_sparse or row.reason for row in plan.rows_of(phase)) for phase in Phase)


def test_sdgp_is_a_part_of_its_own() -> None:
    config = LayerConfig(backward_gradient=Pruning("sdgp", "2:4"), update_gradient=Pruning("mvue", "2:4"))  # type: ignore[arg-type]
    report = nmcompile.analyze(net(), "dense", config=CompileConfig(layers={"_default": config}, ends="sparse"))
    assert report.layer("3").plan.parts() == ((Phase.BACKWARD,), (Phase.UPDATE,))
