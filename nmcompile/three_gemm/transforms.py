"""Layers under the transforms of `torch.func` (`grad`, `vmap`, `jacrev`, `jvp`, ...) and under forward-mode AD.

A transform passes wrapped tensors around, which no kernel can read. Inside a `torch.autograd.Function` they are plain
again, so everything that reads a pruned layer's tensors is one here. Their `vmap` rules run slice by slice. A layer
that prunes and quantizes nothing needs none of this: PyTorch knows the derivatives of its operators.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from nmcompile.autograd_context import AutogradContext
from nmcompile.errors import GradientError
from nmcompile.fingerprint import fingerprint
from nmcompile.three_gemm.autograd_function import (
    LayerContext,
    draws_for,
    gradients,
    named,
    no_second_derivative,
    save,
)
from nmcompile.three_gemm.mask_source import MaskSource

if TYPE_CHECKING:
    from nmcompile.three_gemm.triple import GemmTriple

Dims = tuple[int | None, ...]
"""Mapped dim of each argument, as given to `vmap` rules; None if the argument is not mapped."""
Sliced = tuple[tuple[Tensor | None, ...], Dims]
Inputs = tuple[Any, ...]
"""Arguments of `apply`: the triple first, then its operands."""


class VmapInfo(Protocol):
    """Information about the transform that a `vmap` rule gets."""

    batch_size: int
    randomness: str


def are_transforms_active() -> bool:
    """Return whether a transform of `torch.func` or a forward-mode AD level is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def mask_of(source: MaskSource, weight: Tensor) -> Tensor:
    """Return the mask of a weight that a transform may have wrapped; under `vmap` each weight has its own mask."""
    if not torch._C._are_functorch_transforms_active():
        return _current(source, weight)
    mask: Tensor = _Mask.apply(source, weight)  # type: ignore[no-untyped-call]
    return mask


def _current(source: MaskSource, weight: Tensor) -> Tensor:
    is_followed = torch.is_grad_enabled() and source.is_followed
    return source.current(weight, None if is_followed else fingerprint(weight))


def run_layer(triple: "GemmTriple", *operands: Tensor | None) -> Tensor:
    """Return the output of a layer for its operands, in the order of `OPERANDS`."""
    if triple.is_dense:
        return triple.forward_of(named(operands))[0]
    outputs: tuple[Tensor, ...] = _Layer.apply(triple, *operands)  # type: ignore[no-untyped-call]
    return outputs[0]


class _Mask(Function):
    """The mask of a weight."""

    @staticmethod
    def forward(source: MaskSource, weight: Tensor) -> Tensor:
        return _current(source, weight).detach()

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: tuple[MaskSource, Tensor], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: AutogradContext, *tangents: Tensor | None) -> None:
        return None

    @staticmethod
    def vmap(info: VmapInfo, in_dims: Dims, source: MaskSource, weight: Tensor) -> tuple[Tensor | None, int | None]:
        masks, dims = _by_slices(lambda one: (mask_of(source, one),), info, in_dims[1:], [weight])
        return masks[0], dims[0]


class _Layer(Function):
    """The forward graph of a pruned layer: its output, then the values that the other two graphs read."""

    @staticmethod
    def forward(triple: "GemmTriple", *operands: Tensor | None) -> tuple[Tensor, ...]:
        return triple.forward_of(named(operands))

    @staticmethod
    def setup_context(ctx: LayerContext, inputs: Inputs, outputs: tuple[Tensor, ...]) -> None:
        triple, *operands = inputs
        save(triple, ctx, named(operands), outputs[1:])
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(ctx: LayerContext, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _Gradients.apply(ctx.triple, ctx.names, ctx.needs_input_grad, grad_output, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return None, *gradients

    @staticmethod
    def jvp(ctx: LayerContext, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return _tangent(ctx.triple, ctx.saved_tensors, tangents), *(None for _ in ctx.triple.graphs.saved)

    @staticmethod
    def vmap(info: VmapInfo, in_dims: Dims, triple: "GemmTriple", *operands: Tensor | None) -> Sliced:
        return _by_slices(partial(_Layer.apply, triple), info, in_dims[1:], operands)


class _Gradients(Function):
    """The backward and the update graph of a pruned layer, which have no derivative."""

    @staticmethod
    def forward(
        triple: "GemmTriple", names: Sequence[str], needs: Sequence[bool], *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        return gradients(triple, names, needs, *tensors)

    @staticmethod
    def setup_context(ctx: LayerContext, inputs: Inputs, outputs: tuple[Tensor | None, ...]) -> None:
        ctx.triple = inputs[0]

    @staticmethod
    def backward(ctx: LayerContext, *_: Tensor) -> None:
        raise no_second_derivative(ctx.triple)

    @staticmethod
    def vmap(
        info: VmapInfo,
        in_dims: Dims,
        triple: "GemmTriple",
        names: Sequence[str],
        needs: Sequence[bool],
        *tensors: Tensor | None,
    ) -> Sliced:
        if draws_for(triple, needs) and info.randomness != "different":
            raise GradientError(
                f"layer {triple.layer.name!r}: its gradients are pruned at random, with draws of its own for each "
                "sample; pass randomness='different' to torch.func.vmap"
            )
        return _by_slices(partial(_Gradients.apply, triple, names, needs), info, in_dims[3:], tensors)


def _tangent(triple: "GemmTriple", operands: Sequence[Tensor | None], tangents: Sequence[Tensor | None]) -> Tensor:
    """Return dY = dX (mask ∘ W)ᵀ + X dWᵀ + db: the tangent of W passes straight through, as its gradient does."""
    if not triple.is_bilinear:
        raise GradientError(
            f"layer {triple.layer.name!r}: forward-mode derivatives are not defined where its input or output is "
            "pruned or quantized; use reverse mode (torch.func.grad, vjp), or leave the layer out with "
            f"CompileConfig(layers={{{triple.layer.name!r}: None}})"
        )
    values, (dx, dw, db) = named(operands), tangents[:3]
    x, bias, mask = values["input"], values["bias"], values["weight_mask"]
    assert x is not None
    no_bias = None if bias is None else torch.zeros_like(bias)
    along_input = {"input": torch.zeros_like(x) if dx is None else dx, "bias": no_bias if db is None else db}
    tangent: Tensor = _Layer.apply(triple, *(values | along_input).values())[0]  # type: ignore[no-untyped-call]
    if dw is None:
        return tangent
    everything = None if mask is None else torch.ones_like(mask)
    along_weight = {"weight": dw, "weight_mask": everything, "bias": no_bias}
    other: Tensor = _Layer.apply(triple, *(values | along_weight).values())[0]  # type: ignore[no-untyped-call]
    return tangent + other


def _by_slices(
    function: Callable[..., tuple[Tensor | None, ...]],
    info: VmapInfo,
    in_dims: Dims,
    inputs: Sequence[Tensor | None],
) -> Sliced:
    """Run a function for each slice along the mapped dims, and stack its results along dim 0."""
    slices = [
        [x if x is None or dim is None else x.select(dim, index) for x, dim in zip(inputs, in_dims, strict=True)]
        for index in range(info.batch_size)
    ]
    columns = list(zip(*(function(*one) for one in slices), strict=True))
    results = tuple(None if column[0] is None else torch.stack(column) for column in columns)
    return results, tuple(None if result is None else 0 for result in results)
