"""One callback for Hugging Face's Trainer and for Lightning that monitors sparse training."""

from torch import nn

from nmcompile.api.monitor import Monitor, Writer, monitor
from nmcompile.api.trainers import EitherTrainer, LightningTrainer, TrainerState, TrainingArguments
from nmcompile.errors import ConfigError


class MonitorTraining(EitherTrainer):
    """A callback for `transformers.Trainer` and for `lightning.Trainer` that writes the scalars of `monitor`.

    It imports neither trainer. Only the first process writes.

    Args:
        writer: as `monitor` takes it. Lightning's loggers are written to if it is None; Hugging Face's Trainer does
            not lend its writers to callbacks, so it needs one, such as `SummaryWriter(args.logging_dir)`.
        share: as `monitor` takes it.
    """

    state_key = _legacy_state_key = "nmcompile.training.MonitorTraining"  # of Lightning

    def __init__(self, writer: Writer | None = None, *, share: float = 0.01) -> None:
        self.writer = writer
        self.share = share
        self._monitor: Monitor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: object, model: nn.Module, **kwargs: object
    ) -> None:
        """Start, in Hugging Face's Trainer."""
        if self.writer is None:
            raise ConfigError(
                "MonitorTraining has no writer, and Hugging Face's Trainer lends none; give one, such as "
                "torch.utils.tensorboard.SummaryWriter(args.logging_dir)"
            )
        if state.is_world_process_zero:
            self._monitor = monitor(model, self.writer, share=self.share)

    def on_train_start(self, trainer: LightningTrainer, module: nn.Module) -> None:
        """Start, in Lightning."""
        writer = _Loggers(trainer) if self.writer is None else self.writer
        if trainer.is_global_zero:
            self._monitor = monitor(module, writer, share=self.share)

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        """Stop; both trainers have an event of this name."""
        if self._monitor is not None:
            self._monitor.stop()
            self._monitor = None

    def on_exception(self, *args: object) -> None:
        """Stop when Lightning's training fails."""
        self.on_train_end()


class _Loggers:
    """Lightning's loggers as a `Writer`."""

    def __init__(self, trainer: LightningTrainer) -> None:
        self.loggers = list(trainer.loggers)

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        for logger in self.loggers:
            logger.log_metrics({tag: scalar_value}, step=global_step)
