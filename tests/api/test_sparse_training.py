"""The callback in the trainers themselves: training resumed from their checkpoints equals uninterrupted training."""

import copy
import itertools
import pickle
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerState,
    TrainingArguments,
)

import nmcompile
from nmcompile import CompileConfig
from nmcompile.api.sparse_training import STATE_FILE
from nmcompile.errors import FileError, StateError
from nmcompile.training import SparseTraining
from nmcompile.training.find_masks import masks_of

STEPS, STOP, REFRESH = 7, 3, 2
CONFIG = CompileConfig(refresh=REFRESH, ends="sparse")
LOST = "no sparse state"
# Warnings of the trainers: hints about data loaders and folders, and deprecations in torch and in each other.
pytestmark = pytest.mark.filterwarnings("ignore:(?!.*sparse state|no finalized)")


def equal(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two models have the same weights and the same masks."""
    states = [model.state_dict() | nmcompile.sparse_state_dict(model) for model in (first, second)]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))


def sample(index: int, kind: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    words = torch.randint(32, (8,), generator=generator)
    return {"input_ids": words, "labels": words if kind is gpt2 else words[0] % 2}


def compiled(kind: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nmcompile.compile(kind(), config=CONFIG, inplace=True)


def trained(model: nn.Module, folder: Path, kind: Any = bert, *, callback: bool = True, **options: Any) -> Trainer:
    resume = options.pop("resume", None)
    scores = itertools.count(0, -1)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=0.01, save_steps=STOP,
            logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, **options,
        ),
        train_dataset=[sample(index, kind) for index in range(16)],
        eval_dataset=[sample(index, kind) for index in range(16, 20)],
        callbacks=[SparseTraining()] if callback else [],
        compute_metrics=lambda _: {"score": next(scores)},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Return a model that was trained without interruption, and the folder with its checkpoints."""
    folder, model = tmp_path_factory.mktemp("whole"), compiled(bert)
    trained(model, folder)
    return model, folder


def test_hugging_face_resumes_exactly_and_writes_the_finalized_model(whole: tuple[nn.Module, Path]) -> None:
    model, folder = whole
    resumed = compiled(bert, seed=1)
    trained(resumed, folder, resume=folder / f"checkpoint-{STOP}")
    assert equal(resumed, model)
    final = BertForSequenceClassification.from_pretrained(folder / "finalized")
    words = torch.randint(32, (4, 8))
    assert torch.equal(final.eval()(words).logits, model.eval()(words).logits)
    weights = dict(final.named_parameters())
    masks = masks_of(model)
    assert masks and not any(weights[name][~mask.tensor].any() for name, mask in masks.items())


def test_a_checkpoint_elsewhere_is_found_by_the_arguments_alone(whole: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """A checkpoint of the same step in the new folder is another run's, and is not taken."""
    model, folder = whole
    there = folder / f"checkpoint-{STOP}"
    shutil.copytree(there, tmp_path / there.name)
    state = tmp_path / there.name / "trainer_state.json"
    state.write_text(state.read_text().replace('"loss": ', '"loss": 1'))
    with pytest.warns(UserWarning, match=LOST):
        trained(compiled(bert, seed=1), tmp_path, resume=there, save_strategy="no")
    named = compiled(bert, seed=1)
    trained(named, tmp_path, resume=there, resume_from_checkpoint=str(there), save_strategy="no")
    assert equal(named, model)


def test_a_trainer_without_the_callback_is_told(whole: tuple[nn.Module, Path], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=LOST):
        there = whole[1] / f"checkpoint-{STOP}"
        trained(compiled(bert, seed=1), tmp_path, callback=False, resume=there, save_strategy="no")


def test_the_best_checkpoint_comes_with_its_masks(tmp_path: Path) -> None:
    model = compiled(gpt2)
    trainer = trained(
        model, tmp_path, gpt2, eval_strategy="steps", eval_steps=STOP, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{STOP}")
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == losses[0] != losses[1]
    final = GPT2LMHeadModel.from_pretrained(tmp_path / "finalized")
    words = torch.randint(32, (4, 8))
    assert torch.equal(final.eval()(words).logits, model.eval()(words).logits)


def test_a_damaged_state_is_refused(whole: tuple[nn.Module, Path], tmp_path: Path) -> None:
    there = tmp_path / f"checkpoint-{STOP}"
    shutil.copytree(whole[1] / there.name, there)
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    state = TrainerState.load_from_json(str(there / "trainer_state.json"))
    for damage in (b"", b"\xff" * 64):
        (there / STATE_FILE).write_bytes(damage)
        with pytest.raises(FileError, match=STATE_FILE):
            SparseTraining().on_train_begin(args, state, None, model=compiled(bert))
    save_file({"seed": torch.tensor(1)}, there / STATE_FILE)
    with pytest.raises(StateError):
        SparseTraining().on_train_begin(args, state, None, model=compiled(bert))


def test_a_plain_model_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="not compiled"):
        trained(bert(), tmp_path)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield import_module(request.param)


def lit(lightning: Any, seed: int = 0) -> Any:
    class Lit(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
            self.net = nmcompile.compile(net, config=CONFIG)

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return self.net(x).square().mean()

        def test_step(self, x: Tensor, index: int) -> None:
            self.log("loss", self.training_step(x, index))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.01)

    return Lit()


def data() -> Any:
    return DataLoader(torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), batch_size=4)  # type: ignore[arg-type]


def trainer_of(lightning: Any, folder: Path, *callbacks: Any) -> Any:
    return lightning.Trainer(
        default_root_dir=folder, max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip


def saving(lightning: Any, folder: Path, **options: Any) -> Any:
    return lightning.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, **options)


def test_lightning_resumes_exactly_and_writes_the_finalized_model(lightning: Any, tmp_path: Path) -> None:
    model, resumed, tested, lost = (lit(lightning, seed) for seed in range(4))
    trainer_of(lightning, tmp_path, SparseTraining(), saving(lightning, tmp_path)).fit(model, data())
    first, last = (str(tmp_path / f"epoch={epoch}.ckpt") for epoch in range(2))
    trainer_of(lightning, tmp_path / "resumed", SparseTraining()).fit(resumed, data(), ckpt_path=first)
    assert equal(resumed, model)
    trainer_of(lightning, tmp_path, SparseTraining()).test(tested, data(), ckpt_path=last)
    x = torch.randn(4, 8)
    assert torch.equal(tested.net(x), model.net(x)) and equal(tested, model)
    with pytest.warns(UserWarning, match=LOST):
        trainer_of(lightning, tmp_path / "lost").fit(lost, data(), ckpt_path=first)

    plain: Any = nmcompile.decompile(lit(lightning, 4))
    plain.load_state_dict(load_file(tmp_path / "finalized" / "model.safetensors"))
    assert torch.equal(plain.net(x), model.net(x))


def test_a_lightning_checkpoint_of_weights_alone_is_noticed(tmp_path: Path) -> None:
    lightning = import_module("lightning.pytorch")
    model = lit(lightning)
    callbacks = SparseTraining(finalized=False), saving(lightning, tmp_path, save_weights_only=True)
    trainer_of(lightning, tmp_path, *callbacks).fit(model, data())
    assert not (tmp_path / "finalized").exists()
    with pytest.warns(UserWarning, match=LOST) as warned:
        trainer_of(lightning, tmp_path, SparseTraining()).test(model, data(), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert sum(LOST in str(one.message) for one in warned) == 1


class Standardized(nn.Linear):
    """A layer whose weight is computed, so no parameter can hold its zeros."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight - self.weight.mean(), self.bias)


def test_training_does_not_fail_for_a_model_that_cannot_be_finalized(tmp_path: Path) -> None:
    lightning = import_module("lightning.pytorch")
    model = lit(lightning)
    model.net = nmcompile.compile(nn.Sequential(Standardized(8, 8)), config=CONFIG)
    with pytest.warns(UserWarning, match="no finalized model.*computed in forward"):
        trainer_of(lightning, tmp_path, SparseTraining()).fit(model, data())


def test_events_of_either_trainer_are_taken_also_by_copies() -> None:
    for callback in (copy.deepcopy(SparseTraining()), pickle.loads(pickle.dumps(SparseTraining()))):
        assert callback.on_epoch_begin(1, 2, 3, model=None) is None and callback.finalized
        assert not hasattr(callback, "other")
