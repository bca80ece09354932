"""Methods under comparison: each makes the model of each of its phases, like the schemes of `training.recipes`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

import nmcompile
from nmcompile.api import recipes
from nmcompile.config import CompileConfig
from nmcompile.layer_config import Group, LayerConfig, Pruning
from nmcompile.pruning.pattern import NMPattern

Refresh = int | Literal["steady"] | None


class Method(Protocol):
    """A way to make the models to train, one for each phase; the last one is the result."""

    def __call__(self, model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
        """Yield the model of each phase; the loop that asks for the next one has trained the last one.

        Args:
            model: fresh.
            calibration: batches of inputs.
        """


@dataclass(frozen=True)
class Compiled:
    """The model compiled in a mode, trained in one phase."""

    mode: str
    config: CompileConfig = field(default_factory=CompileConfig)

    def __call__(self, model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
        """Yield the compiled model."""
        args = (calibration[0],)
        yield nmcompile.compile(model, self.mode, args=args, config=self.config, inplace=True)

    def __str__(self) -> str:
        return f"{self.mode} {json.dumps(json.loads(self.config.to_json()))}"


def plain(model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
    """Train the model as it is."""
    yield model


@dataclass(frozen=True)
class Twice:
    """A method of one phase, trained in two."""

    method: Method

    def __call__(self, model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
        """Yield the method's model twice."""
        (made,) = self.method(model, calibration)
        yield made
        yield made

    def __str__(self) -> str:
        return f"{describe(self.method)}, twice"


def scheme_a(model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
    """Train sparse and with 4 bits from scratch (Section 6.4)."""
    return recipes.scheme_a(model, calibration=calibration, inplace=True)


def scheme_b(model: nn.Module, calibration: Sequence[Tensor]) -> Iterator[nn.Module]:
    """Train with sparse activations, then with fixed sparse weights and 4 bits too (Section 6.4); two phases."""
    return recipes.scheme_b(model, calibration=calibration, inplace=True)


def gradients(operator: str, pattern: str, group: Group = "auto") -> Compiled:
    """Prune the neural gradients of the update GEMM."""
    pruning = Pruning(operator, NMPattern.parse(pattern), group)
    return Compiled("gradients", CompileConfig(layers={"_default": LayerConfig(update_gradient=pruning)}))


def weights_and_gradients(operator: str | None, pattern: str | None, refresh: Refresh = "steady") -> Compiled:
    """Prune weights to transposable 2:4, and the neural gradients too if an operator and its pattern are given."""
    gradient = None if operator is None or pattern is None else Pruning(operator, NMPattern.parse(pattern))
    layer = LayerConfig(weight=Pruning("transposable", NMPattern(2, 4)), update_gradient=gradient)
    return Compiled("training", CompileConfig(layers={"_default": layer}, refresh=refresh))


def describe(method: Method) -> str:
    """Return the text that identifies a method in a result."""
    return getattr(method, "__name__", None) or str(method)
