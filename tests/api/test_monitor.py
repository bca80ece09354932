"""The live view of training: its scalars against figures by hand, its pace by a false clock, both trainers."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.api import monitor as monitor_module
from nmcompile.api.pace import WARM_UP, Pace
from nmcompile.errors import ConfigError, StateError
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.training import MonitorTraining, monitor
from nmcompile.training.find_masks import masks_of

SPARSE = CompileConfig(ends="sparse", refresh=1)
X = torch.randn(32, 16)


class Scalars:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.found: dict[str, dict[int, float]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.found.setdefault(tag.removeprefix("nmcompile/"), {})[global_step] = scalar_value


class Clock:
    """A clock by which each reading is a second after the one before."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample each step once the warm-up is over."""
    monkeypatch.setattr(Pace, "is_due", property(lambda self: len(self.usual) >= WARM_UP))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nmcompile.compile(nn.Sequential(nn.Linear(16, 16, bias=False)), config=SPARSE)


def train(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def test_a_writer_that_fails_does_so_once_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "is_due", property(lambda self: self.dearest is None and len(self.usual) >= WARM_UP))
    model, failures = linear(), 0
    with monitor(model, Mock(add_scalar=Mock(side_effect=OSError("no space")))):
        for _ in range(WARM_UP + 10):
            try:
                train(model, 1)
            except OSError:
                failures += 1
    assert failures == 1


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e3])
def test_squares_of_half_precision_gradients_do_not_leave_its_range(scale: float) -> None:
    """Against the gradients themselves: their squares lie beyond float16 at both ends."""
    model, writer = linear().half(), Scalars()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with monitor(model, writer, share=1.0):
        for _ in range(WARM_UP + 2):
            optimizer.zero_grad()
            (model(X.half()) * scale).sum().backward()
            optimizer.step()
    exact = scale * float(X.half().double().sum(0).expand(16, 16).norm())  # each row of dY is scale
    for found in writer.found["gradient_norm"].values():
        assert found == pytest.approx(exact, rel=0.02)
    assert all(0 < noise < 16 for noise in writer.found["estimator_noise"].values())


@pytest.mark.usefixtures("often")
def test_scalars_are_those_of_the_step() -> None:
    """By hand: dY, the dense dW = dYᵀ X, the pruned one that autograd left, and both masks around the refresh."""
    model, writer = linear(), Scalars()
    (mask,) = masks_of(model).values()
    weight, optimizer = model.get_parameter("0.weight"), torch.optim.SGD(model.parameters(), 5.0)
    with monitor(model, writer, share=1.0):
        train(model, WARM_UP + 1, optimizer)
        before, dense = mask.tensor.clone(), weight.detach().clone()
        optimizer.zero_grad()
        output = model(X)
        output.square().mean().backward()
        gradient = (2 * output.detach() / output.numel()).double()
        exact, pruned = gradient.T @ X.double(), weight.grad
        assert pruned is not None
        pruned, after = pruned.double().clone(), mask.tensor.clone()
        optimizer.step()
    found = {name: values[WARM_UP + 2] for name, values in writer.found.items()}
    assert (before != after).any()
    assert found["mask_flips"] == pytest.approx(float((before != after).double().mean()))
    assert found["kept_magnitude"] == pytest.approx(float(dense.abs()[after].sum() / dense.abs().sum()), rel=1e-5)
    assert found["gradient_norm"] == pytest.approx(float(exact.norm()), rel=1e-4)
    noise = float((pruned - exact).square().sum() / exact.square().sum())
    assert noise > 0.01 and found["estimator_noise"] == pytest.approx(noise, rel=1e-3)
    assert all(found[f"milliseconds/{phase}"] > 0 for phase in ("forward", "update"))
    assert found["milliseconds/backward"] == 0  # the input needs no gradient


@pytest.mark.usefixtures("often")
def test_training_is_the_same_bit_for_bit() -> None:
    models = []
    for is_monitored in (False, True):
        torch.manual_seed(1)
        model = nmcompile.compile(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), config=SPARSE)
        if is_monitored:
            with monitor(model, Scalars(), share=1.0):
                train(model, WARM_UP + 6)
        else:
            train(model, WARM_UP + 6)
        models.append(model.state_dict() | nmcompile.sparse_state_dict(model))
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_other_optimizers_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = linear(), nn.Linear(16, 16)
    with monitor(model, Scalars()) as view:
        train(other, 3)
        assert view.steps == 0
        train(model, 3)
        assert view.steps == 3
    train(model, 3)
    assert view.steps == 3


def test_layers_are_let_go_when_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "is_due", property(lambda self: True))
    model = linear()
    view = monitor(model, Scalars())
    train(model, 1)
    assert any(triple.observer for triple in triples_of(model))
    view.stop()
    assert not any(triple.observer for triple in triples_of(model))
    train(model, 2)
    assert not any(triple.observer for triple in triples_of(model))


@pytest.mark.parametrize("cost", [0.2, 1.0, 7.0])
@pytest.mark.parametrize("share", [0.01, 0.1])
def test_samples_stay_within_their_share(cost: float, share: float) -> None:
    """Steps of 1 s, samples that cost more or less than expected: whenever one ends, all took `share` at most.

    Only the first may be dearer than a step, as nothing is known of it; it is made up for before the next.
    """
    pace, total, spent, samples = Pace(share), 0.0, 0.0, 0
    for _ in range(5000):
        is_sampled = pace.is_due
        seconds = 1.0 + cost * is_sampled
        total, spent, samples = total + seconds, spent + cost * is_sampled, samples + is_sampled
        pace.note(seconds, is_sampled)
        if is_sampled and samples > 1:
            assert spent <= share * total
    assert spent <= share * total and samples >= 0.9 * share * 5000 / max(cost, 1.0) / (1 + share) - 1


def test_a_sample_waits_for_a_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "time", Clock())
    monkeypatch.setattr(Pace, "is_due", property(lambda self: len(self.usual) >= WARM_UP))
    model = nmcompile.compile(nn.Sequential(nn.Linear(16, 16)), config=CompileConfig(ends="sparse", refresh=7))
    writer = Scalars()
    with monitor(model, writer, share=1.0):
        train(model, 40)
    assert list(writer.found["mask_flips"]) == [15, 22, 29, 36]  # the step after each seventh


def test_zeros_of_inputs_are_natural_and_forced() -> None:
    x = torch.relu(torch.randn(64, 16))
    model = nmcompile.compile(nn.Sequential(nn.ReLU(), nn.Linear(16, 8)), "activations", args=(x,), config=SPARSE)
    (layer,) = nmcompile.inspect(model, args=(x,)).layers
    kept = x.reshape(64, 2, 8).topk(4, dim=2).values
    assert layer.sample is not None and layer.sample.kept_magnitude is None and layer.sample.noise is None
    assert layer.sample.natural_zeros == pytest.approx(float((x == 0).double().mean()))
    assert layer.sample.forced_zeros == pytest.approx(1 - float((kept > 0).sum()) / x.numel())


def test_noise_is_that_of_the_estimator_on_average() -> None:
    """The mean of ‖dW' - dW‖² over many draws is the closed form of 1:2 MVUE along tokens."""
    x, config = torch.randn(4, 8, dtype=torch.float64), CompileConfig(ends="sparse")
    model = nmcompile.compile(nn.Sequential(nn.Linear(8, 2, bias=False).double()), "gradients", config=config)
    given = torch.tensor([[1.0, 0.5], [-0.3, 0.2], [0.1, -0.7], [0.4, 0.4]], dtype=torch.float64)
    weight, exact, drawn = model.get_parameter("0.weight"), given.T @ x, list[Tensor]()
    for _ in range(2000):
        weight.grad = None
        model(x).backward(given)
        assert weight.grad is not None
        drawn.append((weight.grad - exact).square().sum())
    mean, deviation = torch.stack(drawn).mean(), torch.stack(drawn).std() / 2000**0.5
    # Of the pair (a, b) one is kept, as sign(a) (|a| + |b|) or as sign(b) (|a| + |b|), in proportion to its size.
    expected = sum(
        (a * b).abs() * (a.sign() * one - b.sign() * other).square().sum()
        for gradients, others, one, other in zip(given[0::2], given[1::2], x[0::2], x[1::2], strict=True)
        for a, b in zip(gradients, others, strict=True)
    )
    assert abs(float(mean - expected)) < 5 * float(deviation)


def test_inspecting_with_data_changes_nothing() -> None:
    model = linear()
    train(model, 2)
    before = {name: value.clone() for name, value in (model.state_dict() | nmcompile.sparse_state_dict(model)).items()}
    random = torch.get_rng_state()
    report = nmcompile.inspect(model, args=(X,))
    after = model.state_dict() | nmcompile.sparse_state_dict(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(random, torch.get_rng_state()) and report.layers[0].sample is not None
    assert report.layers[0].status == "sparse" and [one.positions for one in report.layers] == [32]
    assert model.get_parameter("0.weight").grad is not None  # of the last step, as it was
    assert nmcompile.inspect(model).layers[0].sample is None


def test_models_that_cannot_be_looked_into_are_refused() -> None:
    with pytest.raises(StateError, match="not compiled"):
        monitor(nn.Linear(8, 8), Scalars())
    with pytest.raises(ConfigError, match=r"inside torch\.compile"):
        monitor(torch.compile(linear()), Scalars())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give an object with add_scalar"):
        monitor(linear(), None)  # type: ignore[arg-type]


pytest.importorskip("transformers")


@pytest.mark.usefixtures("often")
@pytest.mark.filterwarnings("ignore")
def test_hugging_faces_trainer_is_monitored(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8,
    )  # fmt: skip
    model, writer = nmcompile.compile(BertForSequenceClassification(config), config=SPARSE, inplace=True), Scalars()
    words = [{"input_ids": torch.randint(32, (8,)), "labels": torch.tensor(i % 2)} for i in range(16)]

    def trained(callback: MonitorTraining) -> None:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=WARM_UP + 4, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
        )
        Trainer(model, arguments, train_dataset=words, callbacks=[callback]).train()

    callback = MonitorTraining(writer, share=1.0)
    trained(callback)
    assert set(writer.found) >= {"mask_flips", "kept_magnitude", "estimator_noise", "milliseconds/update"}
    assert min(writer.found["kept_magnitude"]) == WARM_UP + 2 and callback._monitor is None
    with pytest.raises(ConfigError, match="SummaryWriter"):
        trained(MonitorTraining())


@pytest.mark.usefixtures("often")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own_writer", [True, False])
def test_lightning_is_monitored(own_writer: bool, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = nmcompile.compile(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), config=SPARSE)

        def training_step(self, batch: Tensor, index: int) -> Any:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    writer, logger = Scalars(), CSVLogger(tmp_path)
    trainer = lightning.Trainer(
        max_steps=WARM_UP + 4, logger=logger, callbacks=[MonitorTraining(writer if own_writer else None, share=1.0)],
        enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu", log_every_n_steps=1,
    )  # fmt: skip
    data: list[Tensor] = list(torch.randn(200, 16))
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=8))  # type: ignore[arg-type]
    logger.save()
    told = str(list(writer.found)) if own_writer else Path(logger.log_dir, "metrics.csv").read_text()
    assert all(name in told for name in ("mask_flips", "kept_magnitude", "estimator_noise"))
