"""The input and output of each layer in one run of the torch model, as the file has them.

A file knows operators, not modules: a module that derives from a layer or a norm may do more than its operator, as a
convolution that pads by itself and timm's norms with an activation do.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nmcompile.arguments import Args, Kwargs
from nmcompile.config import Phase
from nmcompile.export.deployed_layer import DeployedLayer
from nmcompile.export.write.write_onnx import ExportedNode
from nmcompile.three_gemm.absorbed_norm import AbsorbedNorm
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import Observer, Results, Values, observing
from nmcompile.three_gemm.triple import GemmTriple

Calls = list[tuple[Tensor, Tensor]]
OPERAND: Mapping[object, tuple[int, str]] = {
    **dict.fromkeys((F.linear, F.conv1d, F.conv2d, F.conv3d), (1, "weight")),
    F.batch_norm: (1, "running_mean"),
    torch.batch_norm: (3, "running_mean"),
}
"""Position and name of the argument that tells modules apart, by function."""
GENERATED = "nmcompile."  # forwards that fx generates name no module


def record_calls(
    model: nn.Module, nodes: Sequence[ExportedNode], layers: Mapping[str, DeployedLayer], run: Callable[[], object]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by layer its prepared input, and its output with the norm that the file absorbed in it.

    Args:
        model: with a module of each node's layer and norm.
        nodes: of layers that have one node.
        layers: by name.
        run: calls the model once; a layer that it does not call exactly once is left out.
    """
    calls: dict[str, Calls] = defaultdict(list)
    names = {node.layer for node in nodes} | {node.norm for node in nodes if node.norm}
    triples = [triple for triple in triples_of(model) if triple.layer.name in names]
    observed = {triple.layer.name for triple in triples} | {triple.graphs.plan.norm for triple in triples}
    watched = {name: _Watched(model.get_submodule(name), layers.get(name)) for name in names - observed}
    with torch.no_grad(), ExitStack() as watching:
        watching.enter_context(observing(triples, lambda triple: _Recorder(triple, calls)))
        for one in watched.values():
            one.hook(watching)
        watching.enter_context(_Operators(watched.values()))
        run()
    calls.update({name: one.calls for name, one in watched.items()})
    pairs = {node.layer: (calls[node.layer], calls[node.norm or node.layer]) for node in nodes}
    return {
        layer: (given[0][0], returned[0][1])
        for layer, (given, returned) in pairs.items()
        if len(given) == len(returned) == 1
    }


class _Recorder(Observer):
    """An observer that records the calls of a layer, and of the norm that it absorbs, by their names."""

    def __init__(self, triple: GemmTriple, calls: Mapping[str, Calls]) -> None:
        super().__init__(triple)
        self.calls = calls

    def run(self, phase: Phase, values: Values) -> Results:
        result = super().run(phase, values)
        input, output = values["input"], result[0]
        assert input is not None and output is not None
        self.calls[self.triple.layer.name].append(_copies(input, output))
        return result

    def run_norm(self, norm: AbsorbedNorm, input: Tensor) -> Tensor:
        output = super().run_norm(norm, input)
        self.calls[self.triple.graphs.plan.norm].append(_copies(input, output))
        return output


class _Watched:
    """A plain module, and the calls of its operator. If its forward is torch's own, they are the calls of the module.

    Args:
        module: a layer or a norm without an observer; hooks watch it.
        layer: None for a norm.
    """

    def __init__(self, module: nn.Module, layer: DeployedLayer | None) -> None:
        self.module, self.layer = module, layer
        self.operand = getattr(module, "weight" if layer else "running_mean")
        origin = type(module).forward.__module__ or GENERATED
        self.has_own_forward = not origin.startswith(("torch.nn.", GENERATED))
        self.operators: Calls = []
        self._around: Calls = []

    def hook(self, hooks: ExitStack) -> None:
        """Watch the module until `hooks` are closed."""
        inputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0].detach().clone())

        def after(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
            self._around.append((inputs.pop(), result.detach().clone()))

        # The first of all hooks: others may prune and quantize what the module is given.
        hooks.enter_context(self.module.register_forward_pre_hook(before, prepend=True))
        hooks.enter_context(self.module.register_forward_hook(after))

    @property
    def calls(self) -> Calls:
        """Return the recorded calls, with inputs as the GEMM takes them."""
        seen = self.operators or self._around
        return [(self.layer.layer.prepare(x)[0], result) for x, result in seen] if self.layer else seen


class _Operators(TorchFunctionMode):
    """A mode that records the operators called by forwards other than torch's own, by the tensor that they read."""

    def __init__(self, watched: Iterable[_Watched]) -> None:
        super().__init__()
        self._watched = {id(one.operand): one for one in watched if one.has_own_forward}

    def __torch_function__(
        self, func: Callable[..., object], types: Sequence[type], args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if func in OPERAND:
            position, name = OPERAND[func]
            operand = args[position] if position < len(args) else (kwargs or {}).get(name)
            x = args[0] if args else (kwargs or {})["input"]
            if id(operand) in self._watched and isinstance(x, Tensor) and isinstance(result, Tensor):
                self._watched[id(operand)].operators.append(_copies(x, result))
        return result


def _copies(x: Tensor, result: Tensor) -> tuple[Tensor, Tensor]:
    return x.detach().clone(), result.detach().clone()
