"""`torch.compile(model, backend="nmcompile")`: Dynamo's graphs with sparse GEMMs, handed on to another backend.

Dynamo calls the backend once for each graph: for each part between graph breaks, and again for other shapes, dtypes
and modes. Parameters arrive as inputs, and one graph may serve several modules of a class. So layers are bound to
parameters when these arrive, and what has to last (masks, step counts, random streams) belongs to the parameters.
"""

import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.utils.weak import TensorWeakRef

from nmcompile.api.sparse_graph import sparse_graph
from nmcompile.api.torch_options import MODULE_ONLY, Options
from nmcompile.capture.dynamo_graph import as_model, is_whole_model, sources_of
from nmcompile.errors import CaptureError
from nmcompile.sharded import is_sharded

Runner = Callable[..., object]
_serials = itertools.count()


def torch_backend(
    gm: fx.GraphModule, inputs: Sequence[object], *, mode: object = None, options: object = None
) -> Runner:
    """Compile a graph that Dynamo made: the backend `"nmcompile"` of torch.compile.

    Args:
        gm: the graph, with parameters among its inputs.
        inputs: example inputs, with the real parameters.
        mode: torch.compile's `mode=`: a row of Table 1, `"training"` (also for torch's `"default"`) or `"dense"`.
        options: torch.compile's `options=`, see `Options`.

    Returns:
        A function of the graph's inputs.

    Raises:
        ConfigError: options that do not exist, or that need the whole model.
        CaptureError: parameters that are split among processes, or hidden from the backend.
    """
    given = Options.given(mode, options)
    _check_inputs(inputs)
    graph = SparseGraph(gm, given)
    graph.run_for(inputs)
    return graph


def _check_inputs(inputs: Sequence[object]) -> None:
    """Raise if masks cannot be bound to the parameters among the inputs."""
    if any(isinstance(value, FakeTensor) for value in inputs):
        raise CaptureError(
            "the backend was given fake tensors, as DDP gives to split graphs; set torch._dynamo.config.optimize_ddp "
            f"= False, or {MODULE_ONLY}"
        )
    if any(isinstance(value, nn.Parameter) and is_sharded(value) for value in inputs):
        raise CaptureError(f"the graph has parameters that are split among processes; {MODULE_ONLY}")


class SparseGraph:
    """A graph of Dynamo that runs its layers sparsely, with the masks of whichever parameters arrive.

    It does not keep parameters alive. What was made for some is dropped when the first of them is gone and others come.
    """

    def __init__(self, gm: fx.GraphModule, options: Options) -> None:
        self.gm = gm
        self.options = options
        self.sources = sources_of(gm)
        self.is_whole = is_whole_model(gm)
        self.runs: dict[tuple[int, ...], tuple[Runner, list[TensorWeakRef]]] = {}

    def __call__(self, *inputs: object) -> object:
        return self.run_for(inputs)(*inputs)

    def run_for(self, inputs: Sequence[object]) -> Runner:
        """Return what runs the graph with these parameters, made when they first arrive."""
        parameters = [value for value in inputs if isinstance(value, nn.Parameter)]
        key = tuple(map(id, parameters))
        found = self.runs.get(key)
        if found is None or any(one() is not p for one, p in zip(found[1], parameters, strict=True)):
            self.runs = {key: run for key, run in self.runs.items() if all(one() is not None for one in run[1])}
            graph = as_model(self.gm, inputs, self.sources, self.is_whole)
            run = hand_on(sparse_graph(self.gm, graph, self.options), self.options)
            found = self.runs[key] = run, list(map(TensorWeakRef, parameters))
        return found[0]


def hand_on(module: nn.Module, options: Options) -> Runner:
    """Compile a sparse graph with the backend that comes next."""

    def sparse(*inputs: object) -> object:
        return module.forward(*inputs)

    # Dynamo counts recompilations by code, of which each graph needs its own.
    code = sparse.__code__.replace(co_name=f"sparse_{next(_serials)}")
    function = types.FunctionType(code, sparse.__globals__, code.co_name, None, sparse.__closure__)
    choice: dict[str, Any] = {} if options.then_options is None else {"options": dict(options.then_options)}
    run: Runner = torch.compile(function, backend=options.then, fullgraph=True, **choice)
    return run
