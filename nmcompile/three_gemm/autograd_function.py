"""The autograd function of a layer: the values that its forward graph saves, and the gradients of the other two."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from nmcompile.autograd_context import AutogradContext
from nmcompile.config import Phase
from nmcompile.errors import GradientError

if TYPE_CHECKING:
    from nmcompile.three_gemm.triple import GemmTriple

OPERANDS = ("input", "weight", "bias", "weight_mask", "weight_step", "input_step", "output_step")
"""Operands of a layer, in the order in which its autograd function takes them."""

IMAGE = 4  # dims of the tensors that inductor lays out


class LayerContext(AutogradContext, Protocol):
    """The context of a layer's autograd function; `names` are those of the saved tensors."""

    triple: "GemmTriple"
    names: tuple[str, ...]


class ThreeGemmFunction(Function):
    """Y = X Wᵀ by the forward graph; dX and (dW, db) by the backward and the update graph."""

    @staticmethod
    def forward(ctx: LayerContext, triple: "GemmTriple", *operands: Tensor | None) -> Tensor:
        values = named(operands)
        output, *saved = triple.forward_of(as_they_lie(values) if torch.compiler.is_compiling() else values)
        save(triple, ctx, values, saved)
        return output

    @staticmethod
    def backward(ctx: LayerContext, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        triple = ctx.triple
        # Under torch.compile the grad mode is meaningless here, and AOTAutograd itself refuses double backward.
        if torch.is_grad_enabled() and not triple.is_dense and not torch.compiler.is_compiling():
            raise no_second_derivative(triple)
        return None, *gradients(triple, ctx.names, ctx.needs_input_grad, grad_output, *ctx.saved_tensors)


apply_directly: Callable[..., Tensor] = super(Function, ThreeGemmFunction).apply
"""`ThreeGemmFunction.apply` for eager calls outside of transforms, without the Python that torch puts around it."""


def named(operands: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """Return the operands of a layer by name."""
    return dict(zip(OPERANDS, operands, strict=True))


def as_they_lie(values: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Return the operands of a layer, with strides for weight and mask that a compiler has to keep.

    Inductor would copy both to channels last before each step, as it does for its own convolutions.
    """
    pinned = {
        name: x.as_strided(x.shape, x.stride())
        for name in ("weight", "weight_mask")
        if (x := values[name]) is not None and x.dim() == IMAGE
    }
    return values | pinned


def save(
    triple: "GemmTriple", ctx: LayerContext, values: dict[str, Tensor | None], saved: Sequence[Tensor | None]
) -> None:
    """Save the values that the backward and the update graph read, if autograd will run them."""
    values.update(zip(triple.graphs.saved, saved, strict=True))
    needs = ctx.needs_input_grad
    ctx.triple = triple
    ctx.names = triple.read_by[_needs_backward(needs), _needs_update(needs)]
    ctx.save_for_backward(*[values[name] for name in ctx.names])


def gradients(
    triple: "GemmTriple", names: Sequence[str], needs: Sequence[bool], grad_output: Tensor, *saved: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the operands.

    Args:
        triple: the layer.
        names: names of the saved tensors.
        needs: whether each argument of the autograd function, the triple first, needs a gradient.
        grad_output: dY.
        saved: the tensors that `save` saved.
    """
    values = dict(zip(names, saved, strict=True))
    values["grad_output"] = grad_output
    if triple.mask is not None and needs[2] and not torch.compiler.is_compiling():
        triple.mask.note_backward()
    backward_key, update_key = triple.stream.next_keys().unbind() if triple.draws else (None, None)
    grad_input = grad_weight = grad_bias = None
    grad_steps: list[Tensor | None] = []
    if _needs_backward(needs):
        values["key"] = backward_key
        grad_input, *grad_steps = triple.run(Phase.BACKWARD, values)
    if _needs_update(needs):
        values["key"] = update_key
        grad_weight, *rest = triple.run(Phase.UPDATE, values)
        grad_bias = rest[0] if rest else None
    steps = dict(zip(triple.learned_steps, grad_steps, strict=False))
    return grad_input, grad_weight, grad_bias, None, None, steps.get("input_step"), steps.get("output_step")


def draws_for(triple: "GemmTriple", needs: Sequence[bool]) -> bool:
    """Return whether gradients are pruned at random; `needs` is that of `gradients`."""
    phases = {Phase.BACKWARD: _needs_backward(needs), Phase.UPDATE: _needs_update(needs)}
    return any(is_run and "key" in triple.placeholders[phase] for phase, is_run in phases.items())


def no_second_derivative(triple: "GemmTriple") -> GradientError:
    """Return the error of a second derivative through a pruned layer."""
    return GradientError(
        f"layer {triple.layer.name!r}: a second derivative was asked for (backward with create_graph=True), but a "
        "pruned GEMM has none; compute the penalty on nmcompile.decompile(model), or leave the layer out with "
        f"CompileConfig(layers={{{triple.layer.name!r}: None}})"
    )


def own(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `x` in another shape as a tensor that is not a view: operators may then write to it in place."""
    result: Tensor = torch.ops.aten._unsafe_view(x, shape)
    return result


def _needs_backward(needs: Sequence[bool]) -> bool:
    """Return whether dX is needed, or the gradient of a step that comes with it."""
    return bool(needs[1] or any(needs[6:]))


def _needs_update(needs: Sequence[bool]) -> bool:
    return bool(needs[2] or needs[3])
