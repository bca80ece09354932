"""Callbacks that run a recipe inside Lightning's or Hugging Face's trainer: a phase begins with an epoch."""

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from numbers import Integral
from types import ModuleType
from typing import Any

from torch import nn

from nmcompile.api.trainers import LightningTrainer, TrainerState, TrainingArguments
from nmcompile.checks import check_kind, check_number
from nmcompile.errors import BackendUnavailable, ConfigError


class _Phases:
    """A recipe that advances at the epochs where its phases begin."""

    def __init__(self, recipe: Iterator[nn.Module], begins: Sequence[int]) -> None:
        check_kind("recipe", recipe, Iterator, "a recipe of nmcompile.training.recipes, called with inplace=True")
        check_kind("begins", begins, list | tuple, "a list of epochs, the first of them 0")
        for epoch in begins:
            check_number("an epoch in begins", epoch, Integral, 0, sys.maxsize, "the number of an epoch")
        if not begins or begins[0] != 0 or list(begins) != sorted(set(begins)):
            raise ConfigError(f"begins is {list(begins)}; give rising numbers, the first of them 0")
        self.recipe = recipe
        self.begins = set(begins)

    def reach(self, epoch: int) -> None:
        if epoch in self.begins:
            self.begins.remove(epoch)
            next(self.recipe)


def lightning_callback(recipe: Iterator[nn.Module], begins: Sequence[int]) -> Any:
    """Make a `lightning.pytorch.Callback` that starts the phases of a recipe at these epochs.

    Args:
        recipe: made with `inplace=True`, since the trainer keeps the module that it was given.
        begins: the epoch at which each phase begins, 0 first.

    Raises:
        BackendUnavailable: Lightning is not installed.
    """
    phases = _Phases(recipe, begins)

    class RecipeCallback(_import("lightning.pytorch", "lightning").Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: LightningTrainer, pl_module: nn.Module) -> None:
            phases.reach(trainer.current_epoch)

    return RecipeCallback()


def trainer_callback(recipe: Iterator[nn.Module], begins: Sequence[int]) -> Any:
    """Make a `transformers.TrainerCallback` that does the same as `lightning_callback`'s."""
    phases = _Phases(recipe, begins)

    class RecipeCallback(_import("transformers", "transformers").TrainerCallback):  # type: ignore[misc]
        def on_epoch_begin(
            self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object
        ) -> None:
            phases.reach(round(state.epoch or 0))

    return RecipeCallback()


def _import(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise BackendUnavailable(f"{package} is not installed ({error}); pip install {package}") from error
