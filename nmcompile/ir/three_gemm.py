"""Three graphs behind one autograd function, and the mixin for the modules that call them."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from nmcompile.config import Phase
from nmcompile.errors import GradientError
from nmcompile.ir.at_rest import weights_at_rest
from nmcompile.ir.captured import Site
from nmcompile.ir.grid_steps import GridSteps
from nmcompile.ir.kept import forget
from nmcompile.ir.layers import Layer
from nmcompile.ir.program import ThreeGraphs
from nmcompile.ir.stream import DrawStream


class MaskSource(Protocol):
    """Where the current mask of a weight comes from."""

    tensor: Tensor

    def current(self, weight: Tensor) -> Tensor:
        """The mask, bool of the weight's shape; rebuilt from `weight` if it is stale."""

    def mark_stale(self) -> None:
        """Have the next `current` rebuild the mask."""

    def notice_write(self) -> None:
        """Look whether the weight was written, before something else changes it."""

    def move(self, tensor: Tensor) -> None:
        """Put another tensor (on another device) in the mask's place, the weight having moved too."""

    def note_backward(self) -> None:
        """Hear of a backward call of a layer that uses the mask."""


class GemmTriple:
    """One conv/linear call: runs the forward graph now, the backward and update graphs when autograd asks.

    Args:
        graphs: lowered.
        site: where the layer stands, and the name of its weight.
        mask: of that weight, or None.
        stream: of the keys for random operators.
        steps: of its grids.

    `called` and `positions` (output positions of the last call) are what reports show of a run.
    """

    def __init__(
        self, graphs: ThreeGraphs, site: Site, mask: MaskSource | None, stream: DrawStream, steps: GridSteps
    ) -> None:
        self.graphs = graphs
        self.site = site
        self.mask = mask
        self.stream = stream
        self.steps = steps
        self.called = False
        self.positions: int | None = None
        self.placeholders = {phase: _placeholders(graph) for phase, graph in graphs}
        self.draws = any("key" in names for names in self.placeholders.values())

    @property
    def layer(self) -> Layer:
        return self.graphs.layer

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, rows: slice | None = None) -> Tensor:
        """The layer's output.

        Args:
            input: what the layer's module takes, floating point.
            weight: the dense weight, of the layer's shape.
            bias: `(out,)`, given exactly if the layer has one.
            rows: run only these rows of weight, mask and bias (attention projects queries, keys and values apart).
        """
        mask = None if self.mask is None else self.mask.current(weight)
        if self.draws:
            self.stream.move(input.device)
        is_compiling, is_trained = torch.compiler.is_compiling(), torch.is_grad_enabled()
        if is_trained and not is_compiling:
            forget([weight])
        with nullcontext() if is_trained or is_compiling else weights_at_rest():
            weight_step = self.steps.of_weight(weight)
            if rows is not None:
                weight, mask, bias, weight_step = (_rows(t, rows) for t in (weight, mask, bias, weight_step))
            input, weight, bias = _autocast(input, weight, bias)
            input, unbatched = self.layer.prepare(input)
            operands = input, weight, bias, mask, weight_step, self.steps.of_input(), self.steps.of_output()
            output: Tensor = _ThreeGemmFunction.apply(self, *operands)  # type: ignore[no-untyped-call]
        self._observe(output)
        return output.squeeze(0) if unbatched else output

    def run(self, phase: Phase, values: dict[str, Tensor | None]) -> tuple[Tensor | None, ...]:
        """Run one graph on values by name, outside autocast: the operands have the dtype that they shall have."""
        self.steps.check()
        arguments = [values[name] for name in self.placeholders[phase]]
        device = next(v for v in values.values() if v is not None).device.type
        # Dynamo takes autocast for off behind such a block; operands that are cast already lose nothing without it.
        is_on = not torch.compiler.is_compiling() and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if is_on else nullcontext():
            result: tuple[Tensor | None, ...] = self.graphs[phase](*arguments)
        return result

    def asks(self, phase: Phase, name: str) -> bool:
        return name in self.placeholders[phase]

    def _observe(self, output: Tensor) -> None:
        self.called = True
        if torch.compiler.is_compiling():
            return
        self.positions = output.numel() // max(1, output.shape[self.layer.channel_dim])


class _ThreeGemmFunction(torch.autograd.Function):
    """Y = X W by the forward graph; dX and (dW, db) by the backward and the update graph."""

    @staticmethod
    def forward(
        ctx: Any,
        triple: GemmTriple,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_mask: Tensor | None,
        weight_step: Tensor | None,
        input_step: Tensor | None,
        output_step: Tensor | None,
    ) -> Tensor:
        values = {"input": input, "weight": weight, "bias": bias, "weight_mask": weight_mask}
        values |= {"weight_step": weight_step, "input_step": input_step, "output_step": output_step}
        output, *extra = triple.run(Phase.FORWARD, values)
        values.update(zip(triple.graphs.saved, extra, strict=True))
        wanted = set(triple.placeholders[Phase.BACKWARD]) if _needs_backward(ctx) else set()
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            wanted |= set(triple.placeholders[Phase.UPDATE])
        ctx.triple = triple
        ctx.names = tuple(name for name in values if name in wanted)
        ctx.save_for_backward(*(values[name] for name in ctx.names))
        assert output is not None
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        triple: GemmTriple = ctx.triple
        _refuse_double_backward(triple)
        values = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | {"grad_output": grad_output}
        if triple.mask is not None and not torch.compiler.is_compiling():
            triple.mask.note_backward()
        backward_key, update_key = _keys(triple)
        grad_input = grad_weight = grad_bias = None
        grad_steps: list[Tensor | None] = []
        if _needs_backward(ctx):
            grad_input, *grad_steps = triple.run(Phase.BACKWARD, values | {"key": backward_key})
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            grad_weight, *rest = triple.run(Phase.UPDATE, values | {"key": update_key})
            grad_bias = rest[0] if rest else None
        asked = (triple.asks(Phase.BACKWARD, name) for name in ("input_step", "output_step"))
        input_step, output_step = (grad_steps.pop(0) if ask and grad_steps else None for ask in asked)
        return None, grad_input, grad_weight, grad_bias, None, None, input_step, output_step


def _needs_backward(ctx: Any) -> bool:
    """Whether anyone asks for dX, or for the gradient of a step that comes with it."""
    return bool(ctx.needs_input_grad[1] or any(ctx.needs_input_grad[6:]))


def _rows(x: Tensor | None, rows: slice) -> Any:
    """Those rows of an operand; a scalar holds for all."""
    return x if x is None or x.dim() == 0 else x[rows]


def _keys(triple: GemmTriple) -> tuple[Tensor | None, Tensor | None]:
    if not triple.draws:
        return None, None
    keys = triple.stream.next_keys()
    return keys[0], keys[1]


def _refuse_double_backward(triple: GemmTriple) -> None:
    # Under torch.compile grad mode says nothing here, and AOTAutograd refuses double backward by itself.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise GradientError(
            f"layer {triple.layer.name!r}: backward was called with create_graph=True, but a pruned GEMM has no second "
            "derivative; compute the penalty on nmcompile.decompile(model), or leave the layer out with "
            f"CompileConfig(layers={{{triple.layer.name!r}: None}})"
        )


def _placeholders(graph: fx.GraphModule) -> tuple[str, ...]:
    return tuple(str(node.target) for node in graph.graph.nodes if node.op == "placeholder")


def _autocast(*tensors: Tensor | None) -> Sequence[Any]:
    """What autocast does to the operands of `F.linear` and `F.conv2d`."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (t is not None and t.is_floating_point() and t.dtype != torch.float64 for t in tensors)
    return [t.to(dtype) if ok and t is not None else t for t, ok in zip(tensors, eligible, strict=True)]
