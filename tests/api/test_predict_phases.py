"""`where="likely"`: decisions by cost models alone, and the line that `compile` logs where everything stays pruned."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, Phase
from nmcompile.api import measure_phases
from nmcompile.backends.cpu import cost
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.shared import choose_kernel, timing
from nmcompile.errors import ConfigError
from tests.api.test_measure_phases import dense_phases

LIKELY = CompileConfig(where="likely", ends="sparse")
TOKENS = 1024
native = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)


def net() -> nn.Sequential:
    """Return a layer that gains from pruning with many tokens, and a small one, which never does."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))


def x(tokens: int = TOKENS) -> Tensor:
    return torch.zeros(tokens, 512).requires_grad_()


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test in which a kernel or a layer is timed, or the costs of this machine are measured."""

    def never(*_: object, **__: object) -> None:
        pytest.fail("a clock was read")

    for module in (timing, cost, choose_kernel, measure_phases):
        monkeypatch.setattr(module, "seconds", never)
    cost.costs_here.cache_clear()


@native
def test_layers_that_are_predicted_to_lose_are_dense_and_say_why(no_clock: None) -> None:
    compiled = nmcompile.compile(net(), args=(x(),), config=LIKELY)
    assert dense_phases(compiled) == {"0": set(), "2": set(Phase)}
    assert type(compiled[2]) is nn.Linear  # type: ignore[index]
    reason = nmcompile.inspect(compiled).layer("2").plan.rows_of(Phase.FORWARD)[0].reason
    assert reason.startswith("pruning is predicted not to pay (where='likely'): 0.") and reason.endswith(" dense")
    few = nmcompile.analyze(net(), args=(x(4),), config=LIKELY)
    assert all(row.reason for layer in few.layers for row in layer.plan.rows)


@native
def test_the_number_of_threads_decides_nothing(no_clock: None) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            report = nmcompile.analyze(net(), args=(x(),), config=LIKELY)
            found.append([layer.plan for layer in report.layers])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_pruning_without_a_faster_kernel_never_pays(no_clock: None) -> None:
    for mode, backend in (("training", "reference"), ("activations", "auto")):
        report = nmcompile.analyze(net(), mode, args=(x(),), config=LIKELY, backend=backend)
        assert not any(layer.plan.rewritten for layer in report.layers)


@native
def test_only_what_runs_is_predicted() -> None:
    """In eval() only the forward GEMM; a first layer whose input needs no gradient has no backward GEMM."""
    assert dense_phases(nmcompile.compile(net().eval(), args=(x(),), config=LIKELY))["0"] == {Phase.UPDATE}
    compiled = nmcompile.compile(net(), args=(x().detach(),), config=LIKELY)
    assert dense_phases(compiled)["0"] == set()


@native
def test_a_trained_mask_stays() -> None:
    masked = nmcompile.compile(net(), "t-weights", config=CompileConfig(ends="sparse"))
    again = nmcompile.compile(masked, "training", args=(x(4),), config=LIKELY)
    assert dense_phases(again) == {"0": {Phase.UPDATE}, "2": {Phase.UPDATE}}


@native
def test_the_decision_is_saved_and_loaded() -> None:
    first = nmcompile.compile(net(), args=(x(4),), config=LIKELY)
    second = nmcompile.compile(net(), args=(x(),), config=LIKELY)
    assert dense_phases(second) != dense_phases(first)
    nmcompile.load_sparse_state_dict(second, nmcompile.sparse_state_dict(first))
    assert dense_phases(second) == dense_phases(first)


def test_args_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"where='likely' predicts times from the sizes .* pass args="):
        nmcompile.compile(net(), config=LIKELY)


class Untraced(nn.Sequential):
    """A model that torch.export cannot see through, so nobody knows the sizes of its layers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def bfloat16() -> nn.Module:
    return net().bfloat16()


def untraced() -> nn.Module:
    return Untraced(*net())


@pytest.mark.parametrize(("make", "dtype"), [(untraced, torch.float32), (bfloat16, torch.bfloat16)])
def test_a_model_of_which_nothing_is_known_stays_as_planned_and_is_told(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    with pytest.warns(UserWarning, match=r"where='likely' leaves .* as planned: .* take where='pays', which measures"):
        compiled = nmcompile.compile(make(), args=(x(4).detach().to(dtype),), config=LIKELY)
    assert dense_phases(compiled) == {"0": set(), "2": set()}


@pytest.mark.parametrize(
    ("tokens", "where", "backend", "is_told"),
    [
        (TOKENS, "all", "reference", True),
        (TOKENS, "likely", "reference", False),
        (0, "all", "reference", False),
        (4, "all", "reference", False),
        pytest.param(TOKENS, "all", "cpu", False, marks=native),
    ],
)
def test_a_model_that_is_predicted_to_be_slower_is_told(
    tokens: int, where: str, backend: str, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    args = (x(tokens),) if tokens else None
    with caplog.at_level(logging.WARNING, "nmcompile"):
        nmcompile.compile(net(), args=args, config=CompileConfig(where=where, ends="sparse"), backend=backend)
    assert len(caplog.messages) == is_told
    if is_told:
        (message,) = caplog.messages
        assert message.startswith("Sequential is predicted to slow down: its pruned layers take ")
        assert "where='pays'" in message and "\n" not in message
