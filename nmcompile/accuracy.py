"""Accuracy control: revert the layers that hurt most, until the drop is small enough."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from nmcompile.errors import ConfigError

logger = logging.getLogger("nmcompile")


@dataclass(frozen=True)
class Reverted:
    """Which layers were left dense for the sake of accuracy, and the scores that decided."""

    layers: tuple[str, ...]
    dense: float
    compiled: float

    def __str__(self) -> str:
        names = ", ".join(self.layers) or "none"
        return f"reverted for accuracy: {names} (score {self.compiled:.4f}, dense {self.dense:.4f})"


def revert_layers(
    dense_score: float,
    candidates: Sequence[str],
    build: Callable[[tuple[str, ...]], nn.Module],
    validation: Callable[[nn.Module], float],
    max_drop: float,
) -> Reverted:
    """The layers to leave dense, as few as a greedy search finds.

    Each layer is ranked by the score of a model in which it alone is dense; then layers are reverted in that order, one
    more at a time (the idea of NNCF's accuracy control). It costs one validation a layer, and one a reverted layer.

    Args:
        dense_score: of the dense model; higher is better.
        candidates: the layers that may be reverted.
        build: the compiled model with these layers dense.
        validation: the score of a model.
        max_drop: how far the score may be below `dense_score`.
    """
    if max_drop < 0:
        raise ConfigError(f"max_drop is {max_drop}; give how much the score may fall, a number >= 0")
    score = validation(build(()))
    if dense_score - score <= max_drop:
        return Reverted((), dense_score, score)
    ranked = sorted(candidates, key=lambda name: validation(build((name,))), reverse=True)
    reverted: tuple[str, ...] = ()
    while dense_score - score > max_drop and len(reverted) < len(ranked):
        reverted = tuple(ranked[: len(reverted) + 1])
        score = validation(build(reverted))
        logger.info("reverted %s: score %.4f", reverted[-1], score)
    return Reverted(reverted, dense_score, score)
