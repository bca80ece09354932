"""One callback for Hugging Face's Trainer and for Lightning: checkpoints that resume exactly, and a finalized copy."""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nmcompile.api.finalize import finalize
from nmcompile.api.sparse_state import load_sparse_state_dict, sparse_state_dict
from nmcompile.api.trainers import EitherTrainer, LightningTrainer, TrainerState, TrainingArguments
from nmcompile.errors import FileError, PassError
from nmcompile.files.read_files import read_regular
from nmcompile.files.write_atomically import write_atomically
from nmcompile.three_gemm.record import record_of
from nmcompile.training.find_masks import masks_of

STATE_FILE = "sparse_state.safetensors"
"""File of the sparse state, in the folder of a checkpoint of Hugging Face's Trainer."""
STATE_KEY = "nmcompile_sparse_state"
"""Key of the sparse state, in a checkpoint of Lightning."""
HEADER = 2**24  # bytes of a sparse state beside its masks
INEXACT = "its masks are recomputed; after sparse training they differ from the masks of the training"


class SparseTraining(EitherTrainer):
    """A callback for `transformers.Trainer` and for `lightning.Trainer` (or `pytorch_lightning.Trainer`).

    It saves the sparse state of a compiled model with each checkpoint, loads it when training resumes (with
    `load_best_model_at_end` also that of the best checkpoint), and warns if a checkpoint has none. At the end of
    training it writes the finalized model, which computes the same as the trained one; the trainers' own files hold the
    dense weights, which do not.

    Hugging Face: the state is `sparse_state.safetensors` in the checkpoint's folder, the finalized model is the folder
    `finalized` in `output_dir`, made by `save_pretrained` if the model has it. Lightning: the state is a part of the
    checkpoint, the finalized model is `finalized/model.safetensors` beside the checkpoints.

    Args:
        finalized: whether to write the finalized model, for which the whole model is copied once.
    """

    # Lightning's key of the callback in a checkpoint; it warns if a run that resumes from it lacks the callback.
    state_key = _legacy_state_key = "nmcompile.training.SparseTraining"

    def __init__(self, *, finalized: bool = True) -> None:
        self.finalized = finalized
        self.is_restored = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: object, model: nn.Module, **kwargs: object
    ) -> None:
        """Load the sparse state of the checkpoint that the Trainer resumes from."""
        record_of(model)
        if state.global_step:
            folders = [folder for folder in _checkpoints(args, state) if _is_of(folder, state)]
            advice = "set TrainingArguments.resume_from_checkpoint to the folder if it lies outside of output_dir"
            _load_from(folders, model, f"the checkpoint of step {state.global_step}", advice)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: object, model: nn.Module, **kwargs: object
    ) -> None:
        """Save the sparse state in the checkpoint that the Trainer has written."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if not args.should_save:
            return
        if not folder.is_dir():
            warnings.warn(f"{folder} is not there, so the sparse state of its checkpoint is not saved", stacklevel=2)
            return
        write_atomically(folder / STATE_FILE, safetensors.torch.save(sparse_state_dict(model)))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Write the finalized model; both trainers have an event of this name."""
        if len(args) == 2:
            trainer, module = args
            if not trainer.fast_dev_run:
                self._finalize(module, _lightning_folder(trainer) / "finalized", trainer.is_global_zero)
            return
        arguments, state, _ = args
        model, best = kwargs["model"], state.best_model_checkpoint
        if arguments.load_best_model_at_end and best:
            _load_from(
                [Path(best)], model, f"the best checkpoint, {best},", "add SparseTraining before training starts"
            )
        folder = Path(arguments.output_dir, "finalized")
        self._finalize(model, folder, arguments.should_save, kwargs.get("processing_class"))

    def setup(self, trainer: LightningTrainer, module: nn.Module, stage: str) -> None:
        """Expect the sparse state of a checkpoint, if Lightning will load one."""
        self.is_restored = False

    def state_dict(self) -> dict[str, str]:
        """Leave a trace in checkpoints of Lightning."""
        return {"key": STATE_KEY}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Do nothing: `on_load_checkpoint` has the model."""

    def on_save_checkpoint(self, trainer: LightningTrainer, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Put the sparse state into a checkpoint of Lightning."""
        checkpoint[STATE_KEY] = {name: tensor.cpu() for name, tensor in sparse_state_dict(module).items()}

    def on_load_checkpoint(self, trainer: LightningTrainer, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Load the sparse state from a checkpoint of Lightning."""
        if STATE_KEY in checkpoint:
            load_sparse_state_dict(module, checkpoint[STATE_KEY])
            self.is_restored = True

    def on_fit_start(self, trainer: LightningTrainer, module: nn.Module) -> None:
        """Refuse a model that is not compiled."""
        record_of(module)

    def on_train_start(self, trainer: LightningTrainer, module: nn.Module) -> None:
        """Warn if Lightning has loaded a checkpoint without a sparse state."""
        if trainer.ckpt_path and not self.is_restored:
            self.is_restored = True  # one warning is enough
            _warn_of_loss(module, f"{trainer.ckpt_path} holds no sparse state: {INEXACT}")

    on_validation_start = on_test_start = on_predict_start = on_train_start

    def _finalize(self, model: nn.Module, folder: Path, writes: bool, processing: object = None) -> None:
        if not self.finalized:
            return
        try:
            final = finalize(model)
        except PassError as error:
            # Training is over, and its checkpoints are good.
            warnings.warn(f"no finalized model is written: {error}", stacklevel=3)
            return
        if writes:
            _write(final, folder)
            if saves := getattr(processing, "save_pretrained", None):
                saves(folder)


def _checkpoints(args: TrainingArguments, state: TrainerState) -> Iterator[Path]:
    """Yield possible folders of the checkpoint that a Trainer resumes from, which it does not tell its callbacks."""
    if isinstance(args.resume_from_checkpoint, str):
        yield Path(args.resume_from_checkpoint)
    yield Path(args.output_dir, f"checkpoint-{state.global_step}")


def _is_of(folder: Path, state: TrainerState) -> bool:
    """Return whether a checkpoint is the one that the Trainer's state was loaded from, and not another run's."""
    file = folder / "trainer_state.json"
    return file.is_file() and _marks(type(state).load_from_json(str(file))) == _marks(state)


def _marks(state: TrainerState) -> str:
    return json.dumps([state.global_step, state.best_metric, state.log_history])


def _load_from(folders: list[Path], model: nn.Module, what: str, advice: str) -> None:
    file = next((folder / STATE_FILE for folder in folders if (folder / STATE_FILE).exists()), None)
    if file is None:
        _warn_of_loss(model, f"no sparse state is found for {what}: {INEXACT}; {advice}")
    else:
        load_sparse_state_dict(model, _read(file, HEADER + sum(parameter.numel() for parameter in model.parameters())))


def _warn_of_loss(model: nn.Module, message: str) -> None:
    for mask in masks_of(model).values():
        mask.is_resumed = False  # keeps the first step from warning again
    warnings.warn(message, stacklevel=4)


def _read(file: Path, largest: int) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(read_regular(file, largest))
    except SafetensorError as error:
        raise FileError(f"{file}: not a whole safetensors file ({error})") from error


def _lightning_folder(trainer: LightningTrainer) -> Path:
    saving = trainer.checkpoint_callback
    return Path(getattr(saving, "dirpath", None) or trainer.log_dir or trainer.default_root_dir)


def _write(model: nn.Module, folder: Path) -> None:
    saves = getattr(model, "save_pretrained", None)
    # With adapters it would write these alone.
    if saves is not None and not hasattr(model, "peft_config"):
        saves(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(tensors))
