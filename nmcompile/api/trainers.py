"""The parts of the two trainers that callbacks read; neither trainer has to be installed."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing import Any as Callback  # fits what either trainer declares
else:
    Callback = object


class EitherTrainer(Callback):  # type: ignore[misc]
    """A base for callbacks of both trainers, which call every event of theirs: events without a method do nothing.

    Neither trainer's class of callbacks is imported, so both can be missing.
    """

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_") or name in ("setup", "teardown"):
            return _do_nothing
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def state_dict(self) -> dict[str, str]:
        """Leave nothing in checkpoints of Lightning."""
        return {}


def _do_nothing(*args: object, **kwargs: object) -> None:
    """Ignore an event."""


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
    is_world_process_zero: bool
    log_history: Sequence[Mapping[str, float]]

    @classmethod
    def load_from_json(cls, json_path: str) -> "TrainerState":
        """Read a checkpoint's state."""


class Logger(Protocol):
    """A logger of Lightning."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the values of a step."""


class LightningTrainer(Protocol):
    """Lightning's Trainer."""

    current_epoch: int
    fast_dev_run: bool | int
    is_global_zero: bool
    loggers: Sequence["Logger"]
    ckpt_path: object
    checkpoint_callback: object
    log_dir: str | None
    default_root_dir: str
