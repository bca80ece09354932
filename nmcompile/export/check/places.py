"""The places where a torch model runs its layers, and a way to replace the inputs that layers read there."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.nn import functional as F

from nmcompile.config import Phase
from nmcompile.ir.layers import Layer
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import Observer, Results, Values, observing
from nmcompile.three_gemm.triple import GemmTriple

Place = GemmTriple | nn.Module
"""A layer of a compiled model, or a plain module."""
TakeOver = Callable[[Tensor], Tensor]


def places_of(model: nn.Module) -> dict[str, Place]:
    """Return where a model runs its layers, by their names."""
    plain = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    return {**plain, **{triple.layer.name: triple for triple in triples_of(model)}}


def follow(place: Place, layer: Layer, take_over: TakeOver) -> AbstractContextManager[object]:
    """Replace the input of a layer inside the context.

    Args:
        place: where the layer runs.
        layer: the layer.
        take_over: maps the layer's input to the tensor that the layer reads in its place, both prepared for its GEMM.
    """
    if isinstance(place, GemmTriple):
        return observing([place], lambda triple: _Follower(triple, take_over))
    return _follow_module(place, layer, take_over)


class _Follower(Observer):
    """An observer that passes the input of a layer through a function."""

    def __init__(self, triple: GemmTriple, take_over: TakeOver) -> None:
        super().__init__(triple)
        self.take_over = take_over

    def run(self, phase: Phase, values: Values) -> Results:
        input = values["input"]
        assert input is not None
        return super().run(phase, {**values, "input": self.take_over(input)})


def _follow_module(module: nn.Module, layer: Layer, take_over: TakeOver) -> AbstractContextManager[object]:
    """Hook a plain module, which has no observer."""
    pads = [-pad for pad in getattr(layer, "pad_before", ())]

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        return F.pad(take_over(layer.prepare(x)[0]), pads).reshape(x.shape), *rest

    # The first of all hooks: others may prune and quantize what the module is given.
    return module.register_forward_pre_hook(before, prepend=True)
