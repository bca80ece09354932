"""One conv or linear call that runs on three graphs."""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, fx

from nmcompile.arguments import Kwargs
from nmcompile.config import Phase
from nmcompile.custom_op import cpu_op
from nmcompile.errors import ConfigError
from nmcompile.fingerprint import fingerprint
from nmcompile.ir.captured import Site
from nmcompile.ir.program import ThreeGraphs
from nmcompile.sharded import PLAIN, is_sharded
from nmcompile.spare_memory import empty
from nmcompile.three_gemm.autograd_function import OPERANDS, ThreeGemmFunction, apply_directly, named, own
from nmcompile.three_gemm.draw_stream import DrawStream
from nmcompile.three_gemm.frozen import Frozen
from nmcompile.three_gemm.grid_steps import GridSteps
from nmcompile.three_gemm.mask_source import MaskSource
from nmcompile.three_gemm.observer import Observer, Results, Values
from nmcompile.three_gemm.prepared import Prepared, look_of
from nmcompile.three_gemm.shards import Shards
from nmcompile.three_gemm.shortcut import Shortcut, find_shortcut, has_shortcut
from nmcompile.three_gemm.transforms import are_transforms_active, mask_of, run_layer
from nmcompile.weight_cache import FROZEN, Content, forget, weights_at_rest

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Matrix:
    """One matrix of a weight that is a stack of them.

    Args:
        index: which one.
        values: its elements, as the parameter stores them.
    """

    index: int
    values: Tensor


Rows = slice | Matrix | None
_serials = itertools.count()
_alive: "weakref.WeakValueDictionary[str, GemmTriple]" = weakref.WeakValueDictionary()


class GemmTriple:
    """One conv/linear call: runs the forward graph now, the backward and update graphs when autograd asks.

    Args:
        graphs: lowered.
        site: where the layer is, and the name of its weight.
        mask: mask of that weight, or None.
        stream: the stream of keys for random operators.
        steps: steps of its grids.

    Reports show `called` and `positions` (output positions of the last call) after a run. `is_dense` says that
    nothing is pruned or quantized, `is_bilinear` that the output is linear in the input and in the weight. While
    `observer` is set, it runs the layer in place of `run`; only `observing` sets it.
    """

    def __init__(
        self, graphs: ThreeGraphs, site: Site, mask: MaskSource | None, stream: DrawStream, steps: GridSteps
    ) -> None:
        self.graphs = graphs
        self.layer = graphs.layer
        self.site = site
        self.mask = mask
        self.stream = stream
        self.steps = steps
        self.frozen: Frozen | None = None
        self.observer: Observer | None = None
        self.prepared: dict[Phase, Prepared] = {}
        self.shortcut: Shortcut | None = None
        self.has_shortcut = has_shortcut(graphs[Phase.FORWARD])
        self.choosing = frozenset(phase for phase, _ in graphs if any(meta.choice for meta in graphs.metas(phase)))
        self.called = False
        self._enroll()
        self.positions: int | None = None
        self.placeholders = {phase: _placeholders(graph) for phase, graph in graphs}
        self.draws = any("key" in names for names in self.placeholders.values())
        self.read_by = {needs: self._saved_names(*needs) for needs in product((False, True), repeat=2)}
        backward = self.placeholders[Phase.BACKWARD]
        self.learned_steps = [name for name in ("input_step", "output_step") if name in backward]
        rows = graphs.plan.rows
        self.is_dense = not any(row.is_sparse or row.is_quantized for row in rows)
        self.is_bilinear = not any(row.is_quantized or row.operand in ("input", "output") for row in rows)

    def _enroll(self) -> None:
        self.serial = str(next(_serials))  # Dynamo might trace a number for any value
        _alive[self.serial] = self

    def _saved_names(self, needs_backward: bool, needs_update: bool) -> tuple[str, ...]:
        """Return the operands and results of the forward graph that the graphs of these gradients read."""
        wanted = set(self.placeholders[Phase.BACKWARD] if needs_backward else ())
        wanted.update(self.placeholders[Phase.UPDATE] if needs_update else ())
        return tuple(name for name in (*OPERANDS, *self.graphs.saved) if name in wanted)

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, rows: Rows = None) -> Tensor:
        """Return the layer's output.

        Args:
            input: the input of the layer's module, floating point.
            weight: the dense weight, as its parameter stores it.
            bias: `(out,)`, given exactly if the layer has one.
            rows: run only these rows of weight, mask and bias (attention projects queries, keys and values separately),
                or this matrix of a stack.
        """
        if self.shortcut is not None and rows is None and not torch.compiler.is_compiling():
            result = self.shortcut.run(self, input, weight, bias)
            if result is not None:
                self._note_output(result)
                return result
            self.shortcut = None
        is_trained = torch.is_grad_enabled() and weight.requires_grad
        is_compiling = torch.compiler.is_compiling()
        if is_compiling and rows is None and self._is_operator(input, weight):
            note_traced_call(self.serial)
            return frozen_layer(input, weight, bias, self.serial)
        is_transformed = not is_compiling and are_transforms_active()
        content = None if is_transformed else self._look(weight, is_trained, is_compiling)
        mask = None if self.mask is None else self._mask(self.mask, weight, content, is_trained, is_transformed)
        shards = None
        if type(weight) not in PLAIN and is_sharded(weight):
            shards = self._shards(input, weight, rows)
            input, weight, bias, mask = shards.take(input, weight, bias, mask)
        self._move(input.device)
        run = self._runner(is_compiling, is_transformed)
        if content is None or not is_at_rest(content, weight, is_trained, is_compiling):
            output, unbatched = self._output(run, input, weight, bias, mask, rows)
        else:
            with weights_at_rest(content):
                output, unbatched = self._output(run, input, weight, bias, mask, rows)
        if is_compiling:
            self.note_call()
        else:
            self._note_output(output)
            if content == FROZEN and self.has_shortcut and rows is None:
                self.shortcut = find_shortcut(self, bias)
        output = own(output, output.shape[1:]) if unbatched else output
        return output if shards is None else shards.give(output)

    def accumulator_step(self, weight: Tensor) -> Tensor | None:
        """Return the step of the integer sums, float64, one or `(out,)`; None unless weight and input are quantized."""
        is_trained = torch.is_grad_enabled() and weight.requires_grad
        is_asked = weight.device.type == "cpu" or (self.frozen is not None and self.frozen.holds)
        if is_trained or not is_asked or torch.compiler.is_compiling() or are_transforms_active():
            return self.steps.of_accumulator(weight)
        content = self._look(weight, is_trained=False, is_compiling=False)
        if content is None:
            return self.steps.of_accumulator(weight)
        with weights_at_rest(content):
            return self.steps.of_accumulator(weight)

    def note_call(self) -> None:
        """Note that the layer is called."""
        if torch.compiler.is_dynamo_compiling():
            note_traced_call(self.serial)
        else:
            self.called = True

    def _note_output(self, output: Tensor) -> None:
        """Note that the layer is called, and its number of output positions."""
        self.note_call()
        self.positions = output.numel() // max(1, output.shape[self.layer.channel_dim])

    def _is_operator(self, input: Tensor, weight: Tensor) -> bool:
        """Return whether a graph that is being made calls the layer as an operator, which takes its shortcut."""
        if self.frozen is None or not self.frozen.holds or torch.is_grad_enabled() or torch.compiler.is_exporting():
            return False
        is_taken = self.has_shortcut and self.observer is None and not torch._C._is_any_autocast_enabled()
        is_plain = input.device.type == weight.device.type == "cpu" and input.dtype == weight.dtype == torch.float32
        return is_taken and is_plain and input.dim() > 1 and self.layer.takes(input) and self.frozen.covers(weight)

    def _output(
        self,
        run: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        rows: Rows,
    ) -> tuple[Tensor, bool]:
        """Return the output, and whether it has a batch dim that the input had not."""
        weight_step, *steps = self.steps.current(weight)
        if isinstance(rows, Matrix):
            weight, mask, weight_step = rows.values, _matrix(mask, rows.index), _matrix(weight_step, rows.index)
        elif rows is not None:
            weight = weight[rows]
            mask, bias, weight_step = (_rows(t, rows) for t in (mask, bias, weight_step))
        if torch._C._is_any_autocast_enabled():
            input, weight, bias = _autocast(input, weight, bias)
        input, unbatched = self.layer.prepare(input)
        return run(self, input, weight, bias, mask, weight_step, *steps), unbatched

    @staticmethod
    def _runner(is_compiling: bool, is_transformed: bool) -> Callable[..., Tensor]:
        """Return the function that runs a layer on its operands."""
        if is_compiling:
            return ThreeGemmFunction.apply
        if is_transformed:
            return run_layer
        return apply_directly if torch.is_grad_enabled() else _run_forward

    @staticmethod
    def _mask(
        source: MaskSource, weight: Tensor, content: Content | None, is_trained: bool, is_transformed: bool
    ) -> Tensor:
        return mask_of(source, weight) if is_transformed else source.current(weight, content, is_trained)

    def thaw(self) -> None:
        """End the promise of `nmcompile.freeze`, if it was given."""
        if self.frozen is not None:
            self.frozen.end()

    def _look(self, weight: Tensor, is_trained: bool, is_compiling: bool) -> Content | None:
        """Return the fingerprint of the weight, if something may depend on it and the call can afford to look."""
        if self.frozen is not None and self.frozen.holds:
            if is_trained:
                self.frozen.end()
            elif self.frozen.covers(weight):
                return FROZEN
        if is_compiling:
            return None
        if is_trained:
            forget([weight])
            return None if self.mask is None or self.mask.is_followed else fingerprint(weight)
        if self.mask is None and self.steps.weight_grid is None:
            return None
        # Waiting for a GPU costs too much in each training step of a model with untrained weights.
        is_asked = weight.device.type == "cpu" or not torch.is_grad_enabled()
        return fingerprint(weight) if is_asked else None

    def _move(self, device: torch.device) -> None:
        """Move the random stream and the steps of grids to where the layer runs."""
        if self.draws:
            self.stream.move(device)
        self.steps.move(device)

    def _shards(self, input: Tensor, weight: "DTensor", rows: Rows) -> Shards:
        if rows is not None:
            packs = "is a stack of matrices" if isinstance(rows, Matrix) else "packs three projections"
            raise ConfigError(
                f"layer {self.layer.name!r}: its weight {packs}, and is split among processes; leave "
                f"it dense with CompileConfig(layers={{{self.layer.name!r}: None}}), or do not parallelize it"
            )
        shards = Shards(self.graphs.plan, input, weight)
        self.stream.rank = shards.draw_rank
        self.stream.replicas.rank = shards.batch_rank
        return shards

    def run(self, phase: Phase, values: Values) -> Results:
        """Run one graph, or its observer, on values by name."""
        if self.observer is not None:
            return self.observer.run_eagerly(phase, values)
        if self.steps.activations:
            self.steps.check()
        if phase in self.choosing:
            return self._run_prepared(phase, values)
        # Nobody hooks a graph, so its forward is called, not the module.
        return self.run_graph(phase, values, self.graphs.graphs[phase].forward)

    def _run_prepared(self, phase: Phase, values: Values) -> Results:
        """Run a graph that chooses a kernel, or its direct code if equal operands have settled the choice."""
        arguments = [values[name] for name in self.placeholders[phase]]
        look = look_of(arguments)
        if look is None:
            return self.run_graph(phase, values, self.graphs.graphs[phase].forward)
        prepared = self._prepared(phase)
        if prepared.knows(look):
            return prepared.run(look, arguments)
        results = self.run_graph(phase, values, self.graphs.graphs[phase].forward)
        prepared.learn(look)
        return results

    def _prepared(self, phase: Phase) -> Prepared:
        """Return the prepared graph of a phase, made anew if the graph was changed."""
        graph, prepared = self.graphs.graphs[phase], self.prepared.get(phase)
        if prepared is None or prepared.code is not type(graph).forward:
            prepared = self.prepared[phase] = Prepared(graph)
        return prepared

    def run_graph(self, phase: Phase, values: Values, graph: Callable[..., Results]) -> Results:
        """Run the graph of a phase, or its replacement, outside autocast: the operands have their dtypes."""
        arguments = [values[name] for name in self.placeholders[phase]]
        # Dynamo takes autocast for off after such a block; operands that are cast already do not need it.
        if not torch._C._is_any_autocast_enabled() or torch.compiler.is_compiling():
            return graph(*arguments)
        device = next(v for v in values.values() if v is not None).device.type
        with torch.autocast(device, enabled=False):
            return graph(*arguments)

    def __getstate__(self) -> dict[str, object]:
        # A copy is not observed, and has graphs of its own.
        return self.__dict__ | {"observer": None, "prepared": {}, "shortcut": None}

    def __setstate__(self, state: Kwargs) -> None:
        self.__dict__.update(state)
        self._enroll()

    def forward_of(self, values: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
        """Return the output, which is never a view, and the forward values that the other two graphs read."""
        output, *saved = cast(tuple[Tensor, ...], self.run(Phase.FORWARD, values))
        return output if torch.compiler.is_compiling() or not output._is_view() else own(output, output.shape), *saved


def note_traced_call(serial: str) -> bool:
    """Note that a layer is called, while a graph that calls it is traced."""
    # Dynamo refuses to set an attribute inside an operator such as activation checkpointing.
    _alive[serial].called = True
    return True


# Dynamo calls it, and traces nothing. `torch.compiler.assume_constant_result` sets this mark too, but imports Dynamo.
setattr(note_traced_call, "_dynamo_marked_constant", True)  # noqa: B010 - functions declare no attributes


def _frozen_result(input: Tensor, weight: Tensor, bias: Tensor | None, serial: str) -> Tensor:
    return empty(input, _alive[serial].layer.result(input, weight))


@cpu_op("frozen_layer", fake=_frozen_result)
def frozen_layer(input: Tensor, weight: Tensor, bias: Tensor | None, serial: str) -> Tensor:
    """Call a frozen layer from a graph of `torch.compile`; `serial` is the layer's number."""
    triple = _alive[serial]
    if triple.shortcut is not None:
        result = triple.shortcut.run_unseen(triple, input, weight, bias)
        if result is not None:
            return result
    return triple(input, weight, bias)


def _run_forward(triple: GemmTriple, *operands: Tensor | None) -> Tensor:
    """Return the output of a layer when nothing will ask for gradients."""
    return triple.forward_of(named(operands))[0]


def is_at_rest(content: Content, weight: Tensor, is_trained: bool, is_compiling: bool) -> bool:
    """Return whether values of the weight may be cached: on a GPU only if they are never compared."""
    return not (is_trained or is_compiling) and (content == FROZEN or weight.device.type == "cpu")


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    """Return these rows of an operand; a scalar holds for all."""
    return x if x is None or x.dim() == 0 else x[rows]


def _matrix(x: Tensor | None, index: int) -> Tensor | None:
    """Return a matrix of a stacked operand; one that all matrices share holds for each."""
    return x if x is None or x.dim() == 0 else x[index if len(x) > 1 else 0]


def _placeholders(graph: fx.GraphModule) -> tuple[str, ...]:
    return tuple(str(node.target) for node in graph.graph.nodes if node.op == "placeholder")


def _autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast operands as autocast does for `F.linear` and `F.conv2d`."""
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return _cast(input, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
