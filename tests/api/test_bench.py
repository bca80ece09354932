"""The measured step: its parts by the profiler, its report, and what `bench` leaves alone."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.api import bench as bench_module
from nmcompile.api import step_parts, whole_step
from nmcompile.api.bench_report import BenchReport
from nmcompile.api.step_parts import Parts, kernel_times
from nmcompile.backends.shared.timing import Turns
from nmcompile.cli import cli
from nmcompile.errors import ConfigError

X = torch.randn(8, 16)
SECONDS = {"dense": 0.5, "all": 0.25, "pays": 0.4}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time nothing: each step runs once, and takes the time of the table."""

    def timed(steps: Mapping[str, Any], clock: object, turns: object) -> dict[str, float]:
        for step in steps.values():
            step()
        return {name: SECONDS.get(name, 1.0) for name in steps}

    monkeypatch.setattr(bench_module, "medians_in_turns", timed)
    monkeypatch.setattr(whole_step, "step_times", lambda *_: (1.0, 1.0))
    monkeypatch.setattr("nmcompile.api.measure_phases.TURNS", Turns(1, 1, 0.0))
    monkeypatch.setattr(step_parts, "PROFILES", 1)


def event(name: str, microseconds: float, *around: str) -> Any:
    """Return an operator as the profiler tells it, within others, the innermost first."""
    parent = event(around[0], 0.0, *around[1:]) if around else None
    return SimpleNamespace(
        name=name, self_cpu_time_total=microseconds, self_device_time_total=2 * microseconds, cpu_parent=parent
    )


EVENTS = {
    "gemm": [
        event("aten::mm", 1.0),
        event("aten::addmm", 2.0, "aten::linear"),
        event("aten::mkldnn_convolution", 4.0, "aten::_convolution", "aten::convolution"),
        event("nmcompile::cpu_linear_pruned_weight_gradient", 8.0, "ThreeGemmFunctionBackward"),
        event("aten::copy_", 16.0, "nmcompile::cpu_linear_forward", "ThreeGemmFunction"),
    ],
    "pruning": [
        event("nmcompile::cpu_prune", 32.0),
        event("nmcompile::cpu_prune", 64.0, "nmcompile::cpu_linear_pruned_weight_gradient"),
        event("nmcompile::next_keys", 128.0),
        event("aten::mul", 256.0, "nmcompile::prune"),
    ],
    "masks": [
        event("nmcompile::refresh_mask", 512.0),
        event("nmcompile::cpu_transposable_mask", 1024.0, "nmcompile::refresh_mask"),
        event("aten::mul_", 2048.0, "nmcompile::refresh_mask"),
        event("nmcompile::mask", 4096.0, "nmcompile::cpu_linear_forward"),
    ],
    "others": [event("aten::threshold_backward", 8192.0, "ReluBackward0"), event("aten::bmm", 16384.0)],
    "none": [
        event("aten::view", 1e6),
        event("autograd::engine::evaluate_function: MmBackward0", 1e6),
        event("ThreeGemmFunction", 1e6),
        event("Optimizer.step#SGD.step", 1e6),
    ],
}


@pytest.mark.parametrize("on_gpu", [False, True])
def test_an_operator_counts_where_the_innermost_known_one_does(on_gpu: bool) -> None:
    times = kernel_times([one for events in EVENTS.values() for one in events], on_gpu)
    expected = {
        part: sum(one.self_device_time_total if on_gpu else one.self_cpu_time_total for one in events) / 1e6
        for part, events in EVENTS.items()
        if part != "none"
    }
    assert times == pytest.approx(expected)


def test_the_profilers_own_time_is_taken_off_each_operator() -> None:
    """All but the shortest lose it, and none takes less than nothing."""
    events = [event("aten::mm", 10.0), event("aten::mm", 1.0), event("aten::relu", 5.0), event("aten::view", 9.0)]
    times = kernel_times(events, on_gpu=False, own=2e-6)
    assert times == pytest.approx({"gemm": 8e-6, "pruning": 0.0, "masks": 0.0, "others": 3e-6})


@pytest.mark.parametrize(
    ("mode", "present", "absent"), [("dense", (), ("pruning", "masks")), ("weights", ("masks",), ("pruning",))]
)
def test_a_real_profile_has_the_parts_of_its_mode(mode: str, present: tuple[str], absent: tuple[str]) -> None:
    model = nmcompile.compile(net(), mode, args=(X,), config=CompileConfig(refresh=1, ends="sparse"))
    step = bench_module.optimized_step(model, (X,), {})
    step()
    times = step_parts.profiled(step, 1.0, 2, on_gpu=False)
    assert times["gemm"] > 0 and times["others"] > 0
    assert all(times[part] > 0 for part in present) and all(times[part] == 0 for part in absent)


def test_pruned_gradients_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nmcompile.compile(net(), "gradients", args=(X,), backend="reference")
    times = step_parts.profiled(bench_module.optimized_step(model, (X,), {}), 1.0, 2, on_gpu=False)
    assert times["pruning"] > 0 and times["masks"] == 0


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_parts_add_up_to_the_measured_step(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the profiler's own time makes the operators add up to more."""
    kernels = {"gemm": 0.3, "pruning": 0.1, "masks": 0.05, "others": 0.05}
    rounds = iter([{part: 9 * time for part, time in kernels.items()}, kernels])
    monkeypatch.setattr(step_parts, "PROFILES", 2)
    monkeypatch.setattr(step_parts, "profiled", lambda *_: next(rounds))
    found = step_parts.step_parts({"a": lambda: None}, {"a": scale}, 1, False)["a"]
    share = min(1.0, scale / 0.5)
    assert list(found) == pytest.approx([0.3 * share, 0.1 * share, 0.05 * share, 0.05 * share, scale - 0.5 * share])
    assert found.total == pytest.approx(scale)


def test_the_step_is_that_of_a_training_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "TINY", 0.1)
    model, other = net(), net()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    step = bench_module.optimized_step(model, (X,), {})
    step(), step()
    torch.manual_seed(3)
    gradient, optimizer = torch.randn(8, 4), torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        other(X).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, expected)


def test_in_eval_a_step_is_the_forward_alone() -> None:
    model, seen = net().eval(), list[Tensor]()
    with model.register_forward_hook(lambda *given: seen.append(given[-1])):
        bench_module.optimized_step(model, (X,), {})()
    (output,) = seen
    assert output.equal(model(X)) and not output.requires_grad


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("is_trained", [True, False])
def test_bench_changes_nothing_and_reports_the_measured_times(is_trained: bool) -> None:
    model = net().train(is_trained)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = nmcompile.bench(model, args=(X,))
    assert torch.equal(random, torch.get_rng_state()) and not nmcompile.is_compiled(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: parts.total for name, parts in found.parts.items()} == pytest.approx(SECONDS)
    assert found.speedup == pytest.approx({"all": 2.0, "pays": 1.25})
    assert found.step == ("forward, backward and optimizer" if is_trained else "forward")
    step = found.report.step_times
    assert step is not None and (step.dense, step.compiled) == (0.5, 0.25)
    assert "250 ms, 500 ms dense: 2.00 ×" in str(found.report) and "all 2.00 ×, pays 1.25 ×" in str(found)
    assert json.loads(found.report.to_json())["step_seconds"] == {"dense": 0.5, "compiled": 0.25}


@pytest.mark.usefixtures("quick")
def test_the_command_prints_json_and_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench_models.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    line = ["bench", "bench_models:build", "--input", "f32[8,16]", "--json", "--html", "report.html"]
    data = json.loads(CliRunner().invoke(cli, line, catch_exceptions=False).output)
    assert data["schema_version"] == 1 and data["seconds"] == pytest.approx(SECONDS)
    assert set(data["parts"]["all"]) == set(Parts._fields) and data["advice"]
    assert '"step_seconds": {"dense": 0.5' in (tmp_path / "report.html").read_text()


def report(dense: Parts, pruned: Parts) -> BenchReport:
    parts = {"dense": dense, "all": pruned, "pays": pruned}
    return BenchReport("Net", "training", "forward", {}, parts, nmcompile.analyze(net()))


DENSE = Parts(gemm=0.6, pruning=0.0, masks=0.0, others=0.3, python=0.1)
LOSSES = {
    "gemm": (DENSE._replace(gemm=0.8), "GEMM, 200 ms more", "larger batch"),
    "pruning": (DENSE._replace(gemm=0.4, pruning=0.3), "pruning, 300 ms more", "where='pays'"),
    "masks": (DENSE._replace(masks=0.05, pruning=0.03), "masks, 50 ms more", "refresh=40"),
    "others": (DENSE._replace(others=0.5), "other operators, 200 ms more", "torch.compile"),
    "python": (DENSE._replace(python=0.4, pruning=0.2), "Python, dispatch, 300 ms more", "graphed_step"),
}


@pytest.mark.parametrize("part", LOSSES)
def test_the_largest_loss_is_named_with_what_to_do(part: str) -> None:
    pruned, told, advice = LOSSES[part]
    found = report(DENSE, pruned)
    assert found.loss is not None and found.loss[0] == part
    assert told in found.advice and advice in found.advice and str(found).endswith(found.advice)


def test_without_a_loss_the_bound_is_told() -> None:
    """GEMMs that take half of 0.6 s leave 0.7 s."""
    found = report(DENSE, DENSE._replace(gemm=0.4, masks=0.01))
    assert found.loss is None and "60% of it" in found.advice and f"{1 / 0.7:.2f} ×" in found.advice


def test_bench_needs_an_example() -> None:
    with pytest.raises(ConfigError, match="pass args="):
        nmcompile.bench(net())
