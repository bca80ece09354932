"""Training runs: resumed after a kill they equal uninterrupted ones bit for bit, and finished ones are not repeated."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile.config import CompileConfig
from nmcompile.errors import FileError
from nmcompile.paper import comparison, train
from nmcompile.paper.checkpoint import Position, load_checkpoint, read_position, save_checkpoint
from nmcompile.paper.comparison import Comparison, Row, Setting
from nmcompile.paper.data import Data, TensorSource, orders_of_epoch
from nmcompile.paper.experiment import Options
from nmcompile.paper.methods import Compiled, Method, plain, scheme_b
from nmcompile.paper.recipe import Recipe
from nmcompile.paper.train import Outcome, Phase, Run, train_run
from tests.faults import killed_at, steps_of

RECIPE = Recipe(epochs=3, batch=16, rate=0.05, decay=1e-4)


class Killed(BaseException):
    """Stands for the signal that ends a process."""


def data() -> Data:
    torch.manual_seed(0)
    x, y = torch.randn(80, 1, 8, 8), torch.arange(80) % 4
    x[:, 0, 0] += y[:, None]
    return Data("random", TensorSource(x[:64], y[:64], crops=True), TensorSource(x[64:], y[64:]), 4)


METHODS: dict[str, tuple[Method, tuple[Phase, ...]]] = {
    "plain": (plain, (Phase(),)),
    "training": (Compiled("training", CompileConfig(refresh=3)), (Phase(),)),
    "scheme B": (scheme_b, (Phase(0.67), Phase(0.33, rate=0.2))),
}


def run(name: str, recipe: Recipe = RECIPE) -> Run:
    method, phases = METHODS[name]
    return Run(name, method, "small", recipe, 0, phases)


def killed_after(epochs: int, monkeypatch: pytest.MonkeyPatch, call: Callable[[], Outcome]) -> None:
    """Run until some epochs are done and saved, and the next one has trained."""
    tests, done = train.test, []

    def test(*args: object) -> object:
        done.append(args)
        if len(done) > epochs:
            raise Killed
        return tests(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(train, "test", test)
        call()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_continues_bit_for_bit(
    name: str, epochs: int, optimizer: Literal["sgd", "adamw"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, optimizer=optimizer, rate=0.05 if optimizer == "sgd" else 1e-3)
    whole = train_run(run(name, recipe), data(), tmp_path / "whole")
    file = tmp_path / "killed"
    killed_after(epochs, monkeypatch, lambda: train_run(run(name, recipe), data(), file))
    position = read_position(file)
    assert position is not None and position.epoch == epochs
    resumed = train_run(run(name, recipe), data(), file)
    assert len(whole.curve) == 3 and resumed.curve == whole.curve
    assert resumed.configuration == whole.configuration


def test_a_kill_at_any_step_of_a_checkpoint_leaves_the_last_whole_one(tmp_path: Path) -> None:
    model = nmcompile.compile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "training")
    optimizer, file = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), tmp_path / "run"

    def save(epoch: int) -> None:
        with torch.no_grad():
            model.get_parameter("0.weight").fill_(epoch)
        save_checkpoint(file, Position({}, 0, epoch, [], 0.0), model, optimizer)

    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    killed = 0
    for step in range(steps_of(lambda: save(2))):
        save(1)
        killed += killed_at(step, lambda: save(2))
        position = read_position(file)
        assert position is not None and position.epoch in (1, 2)
        load_checkpoint(file, model, optimizer)
        assert bool((model.get_parameter("0.weight") == position.epoch).all())
        save(3)
        assert [one.name for one in tmp_path.iterdir()] == ["run"]
    assert killed > 5


def test_a_checkpoint_of_another_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "killed"
    killed_after(2, monkeypatch, lambda: train_run(run("training"), data(), file))
    assert train_run(run("plain"), data(), file).curve == train_run(run("plain"), data(), tmp_path / "x").curve


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "damaged"
    file.write_bytes(b"\x10\0\0\0\0\0\0\0{nothing")
    with pytest.raises(FileError, match="remove it to start the run again"):
        train_run(run("plain"), data(), file)


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.setattr(comparison, "load_data", lambda *_: data())
    rows = (Row("dense", plain, 80.0), Row("sparse", METHODS["training"][0], 79.0))
    return Comparison("tiny", "Tiny", {"quick": Setting("images", "small", RECIPE)}, "Tiny.", rows)


def test_finished_runs_are_not_repeated(
    experiment: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(tmp_path / "new", seeds=2)
    first = experiment.run(options)
    monkeypatch.setattr(comparison, "train_run", lambda *_: pytest.fail("trained again"))
    second = experiment.run(options)
    assert [*first.rows] == [*second.rows] and len(first.data["runs"]) == 4  # type: ignore[arg-type]
    assert [file.name for file in options.out.iterdir()] == ["tiny.json"]


def test_rows_are_paired_with_the_reference(experiment: Comparison, tmp_path: Path) -> None:
    dense, sparse = experiment.run(Options(tmp_path, seeds=2)).rows
    assert dense[1] == 80.0 and dense[4:7] == [None] * 3
    assert sparse[4] == pytest.approx(sparse[2] - dense[2]) and sparse[6] == -1.0  # type: ignore[operator]


def test_orders_of_the_paper_are_noted(experiment: Comparison, tmp_path: Path) -> None:
    dense, sparse = experiment.run(Options(tmp_path, seeds=2)).rows
    notes = replace(experiment, orders=(("sparse", "dense"),)).run(Options(tmp_path, seeds=2)).notes
    assert notes[-1].startswith(f"sparse - dense: {sparse[2] - dense[2]:+.2f}")  # type: ignore[operator]


def test_a_phase_without_a_rate_moves_the_batch_statistics_alone(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    def twice(model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
        for _ in range(2):
            yield model
            seen.append({name: value.clone() for name, value in model.state_dict().items()})

    train_run(Run("twice", twice, "small", RECIPE, 0, (Phase(0.67), Phase(0.33, rate=0.0))), data(), tmp_path / "x")
    moved = {name.rpartition(".")[2] for name, value in seen[1].items() if not torch.equal(value, seen[0][name])}
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}


def test_every_epoch_has_its_own_order() -> None:
    one, other, again = (torch.cat(orders_of_epoch(50, 16, 1, epoch)) for epoch in (0, 1, 0))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.sort().values.tolist() == list(range(50))


def test_the_paper_drops_the_rate_after_30_60_and_80_epochs() -> None:
    recipe = replace(RECIPE, schedule="steps", rate=0.1)
    rates = [recipe.rate_at(epoch / 90) for epoch in (0, 29, 30, 59, 60, 79, 80, 89)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])
