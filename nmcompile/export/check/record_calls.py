"""The input and output of each layer in one run of the torch model, as the file has them.

A file knows operators, not modules: a module that derives from a layer or a norm may do more than its operator, as a
convolution that pads by itself and timm's norms with an activation do.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nmcompile.export.check.places import Place, places_of
from nmcompile.export.write.write_onnx import ExportedNode

Seen = list[tuple[Tensor, Tensor]]
OPERAND: Mapping[Any, tuple[int, str]] = {
    **dict.fromkeys((F.linear, F.conv1d, F.conv2d, F.conv3d), (1, "weight")),
    F.batch_norm: (1, "running_mean"),
    torch.batch_norm: (3, "running_mean"),
}
"""By function, the position and the name of the argument that tells modules apart."""
GENERATED = "nmcompile."  # forwards that fx generates name no module


def record_calls(
    model: nn.Module, nodes: Sequence[ExportedNode], run: Callable[[], Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer, its input, and its output with the norm that the file absorbed in it; those that ran once.

    Args:
        model: with a module of each node's layer and norm.
        nodes: of layers that have one node.
        run: calls the model once.
    """
    modules, places = dict(model.named_modules()), places_of(model)
    watched: dict[str, _Watched] = {}
    for node in nodes:
        watched[node.layer] = _Watched(modules[node.layer], "weight", places.get(node.layer))
        if node.norm:
            watched[node.norm] = _Watched(modules[node.norm], "running_mean", None)
    try:
        with torch.no_grad(), _Operators(watched.values()):
            run()
    finally:
        for one in watched.values():
            one.undo()
    calls = {node.layer: (watched[node.layer].calls, watched[node.norm or node.layer].calls) for node in nodes}
    return {
        layer: (given[0][0], returned[0][1])
        for layer, (given, returned) in calls.items()
        if len(given) == len(returned) == 1
    }


class _Watched:
    """A module, and the calls of its operator: those seen around the module unless its forward is its own."""

    def __init__(self, module: nn.Module, operand: str, place: Place | None) -> None:
        self.operand = getattr(module, operand)
        origin = type(module).forward.__module__ or GENERATED
        self.has_own_forward = not origin.startswith(("torch.nn.", "nmcompile."))
        self.operators: Seen = []
        self._around: Seen = []
        if place is not None and place.role:
            self._undo = [place.watch(lambda x, result: self._around.append(_copies(x, result)))]
            return
        inputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.append(args[0].detach().clone())

        def after(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
            self._around.append((inputs.pop(), result.detach().clone()))

        # The first of all hooks: others may prune and quantize what the module is given.
        hooks = module.register_forward_pre_hook(before, prepend=True), module.register_forward_hook(after)
        self._undo = [hook.remove for hook in hooks]

    @property
    def calls(self) -> Seen:
        return self.operators or self._around

    def undo(self) -> None:
        """Stop watching."""
        for one in self._undo:
            one()


class _Operators(TorchFunctionMode):
    """Records the operators that run inside forwards of their own, by the tensor that they read."""

    def __init__(self, watched: Iterable[_Watched]) -> None:
        super().__init__()
        self._watched = {id(one.operand): one for one in watched if one.has_own_forward}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in OPERAND:
            position, name = OPERAND[func]
            operand = args[position] if position < len(args) else (kwargs or {}).get(name)
            x = args[0] if args else (kwargs or {})["input"]
            if id(operand) in self._watched:
                self._watched[id(operand)].operators.append(_copies(x, result))
        return result


def _copies(x: Tensor, result: Tensor) -> tuple[Tensor, Tensor]:
    return x.detach().clone(), result.detach().clone()
