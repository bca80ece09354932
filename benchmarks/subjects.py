"""Subjects of the benchmark of masks: a model, its calibration data, and a score beside the dense model."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Subject:
    """A trained model whose weights are pruned.

    Args:
        model: dense, in eval mode.
        calibration: batches as `nmcompile.compile` takes them.
        metric: the name of the score.
        score: compares a pruned model with the dense one on data that calibration does not hold.
        args: example inputs, where the mode needs the whole graph; the first batch is one where a row needs it.
        dense: figures of the dense model.
    """

    model: nn.Module
    calibration: Sequence[Any]
    metric: str
    score: Callable[[nn.Module], float]
    args: tuple[Tensor, ...] | None
    dense: dict[str, float]


def files_of(module: str, wheel: str) -> Path:
    """Return the folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{wheel} is not installed: pip install --no-deps {wheel}")
    return Path(spec.submodule_search_locations[0])
