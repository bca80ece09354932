"""The parts of the two trainers that callbacks read; neither trainer has to be installed."""

from collections.abc import Mapping, Sequence
from typing import Protocol


class TrainingArguments(Protocol):
    """The arguments of Hugging Face's Trainer."""

    output_dir: str
    should_save: bool
    load_best_model_at_end: bool
    resume_from_checkpoint: object


class TrainerState(Protocol):
    """The state of Hugging Face's Trainer, which its checkpoints hold as JSON."""

    epoch: float | None
    global_step: int
    best_metric: float | None
    best_model_checkpoint: str | None
    log_history: Sequence[Mapping[str, float]]

    @classmethod
    def load_from_json(cls, json_path: str) -> "TrainerState":
        """Read a checkpoint's state."""


class LightningTrainer(Protocol):
    """Lightning's Trainer."""

    current_epoch: int
    fast_dev_run: bool | int
    is_global_zero: bool
    ckpt_path: object
    checkpoint_callback: object
    log_dir: str | None
    default_root_dir: str
