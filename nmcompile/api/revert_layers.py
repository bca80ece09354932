"""Accuracy control: revert the layers that hurt most, until the drop is small enough."""

import logging
import math
from collections.abc import Callable, Sequence
from numbers import Real

import numpy as np
from torch import Tensor, nn

from nmcompile.checks import described
from nmcompile.errors import ConfigError
from nmcompile.ir.plan import Reverted
from nmcompile.printable import printable

logger = logging.getLogger("nmcompile")


def revert_layers(
    dense_score: float,
    candidates: Sequence[str],
    build: Callable[[tuple[str, ...]], nn.Module],
    validation: Callable[[nn.Module], float],
    max_drop: float,
) -> Reverted:
    """Return the layers to leave dense, as few as a greedy search finds.

    Each layer is ranked by the score of a model in which it alone is dense; then layers are reverted in that order, one
    more at a time (the idea of NNCF's accuracy control). It costs one validation per layer, and one per reverted layer.
    A score that is NaN is below every other, so the layers which cause it are reverted.

    Args:
        dense_score: the dense model's score.
        candidates: the layers that may be reverted.
        build: returns the compiled model with these layers dense.
        validation: returns the score of a model; higher is better.
        max_drop: how far the score may be below `dense_score`.

    Raises:
        ConfigError: a score that is not a number, or NaN for the dense model or with every candidate reverted.
    """
    if math.isnan(dense_score):
        raise ConfigError("validation gives NaN for the dense model; let it return a number, higher for a better model")

    def scored(reverted: tuple[str, ...]) -> float:
        score = score_of(build(reverted), validation)
        return -math.inf if math.isnan(score) else score

    score = scored(())
    if dense_score - score <= max_drop:
        return Reverted((), dense_score, score)
    ranked = sorted(candidates, key=lambda name: scored((name,)), reverse=True)
    reverted: tuple[str, ...] = ()
    while dense_score - score > max_drop and len(reverted) < len(ranked):
        reverted = tuple(ranked[: len(reverted) + 1])
        score = scored(reverted)
        logger.info("reverted %s: score %.4f", printable(reverted[-1]), score)
    if score == -math.inf:
        raise ConfigError("validation gives NaN or -inf even with every layer dense; let it return a finite number")
    return Reverted(reverted, dense_score, score)


def score_of(model: nn.Module, validation: Callable[[nn.Module], object]) -> float:
    """Return the score of a model as a float; a tensor or array counts if it holds a single real number.

    Raises:
        ConfigError: `validation` does not return a number.
    """
    score = validation(model)
    if isinstance(score, Tensor | np.ndarray) and math.prod(score.shape) == 1:
        score = score.item()
    if not isinstance(score, Real):
        given = f"of shape {tuple(score.shape)}" if isinstance(score, Tensor | np.ndarray) else described(score)
        raise ConfigError(f"the score that validation returns is {given}; let it return a number, higher is better")
    return float(score)
