"""The targets of the nodes in the three graphs.

`apply_mask`, `prune` and `to_grid` compute; the GEMM and bias operations only name a computation, and a backend
replaces them (`LoweringError` if it did not). Every node carries a `NodeMeta`.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, fx
from torch.autograd.profiler import record_function
from torch.fx.node import Argument, Target

from nmcompile.custom_op import ANY_STRIDES, custom_op, is_profiling, is_seen
from nmcompile.errors import LoweringError
from nmcompile.ir.grouping import grouped
from nmcompile.ir.node_meta import KEY, NodeMeta
from nmcompile.native import MISSING, kernels
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.references import OPERATORS
from nmcompile.quantization import Grid, integers
from nmcompile.spare_memory import empty_like
from nmcompile.weight_cache import FROZEN, WeightCache, content_at_rest, is_cacheable

FEW = 512  # elements, for which the call of a kernel takes longer than the branches

_masked: WeightCache[Tensor] = WeightCache()


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` where the mask holds, else zero; a pruned NaN or infinity becomes zero too.

    The result for the weight of a frozen model is cached.
    """
    if torch.compiler.is_dynamo_compiling():
        # In a graph the number would be a tensor of the CPU, and CUDA graphs leave out a graph that has one.
        return torch.where(mask, x, x.new_zeros(()))
    if content_at_rest() != FROZEN or not is_cacheable(x, mask):
        return _where(mask, x)
    return _masked.get(x, (mask,), (), lambda: _where(mask, x))


def _where(mask: Tensor, x: Tensor) -> Tensor:
    """Return `torch.where(mask, x, 0.0)`, bit for bit.

    On a CPU that branches at each element, which takes up to sixty times as long as a copy: a processor cannot predict
    a mask. The native kernel takes the bits of each element, or none.
    """
    result = empty_like(x) if x.numel() >= FEW and _takes_bits(mask, x) else None
    if result is None or not x.stride() == mask.stride() == result.stride():
        return torch.where(mask, x, 0.0)
    sizes = x.numel(), x.itemsize
    with record_function("nmcompile::mask") if is_profiling() else nullcontext():
        kernels.write_masked(x.data_ptr(), mask.data_ptr(), result.data_ptr(), *sizes, torch.get_num_threads())
    return result


def _takes_bits(mask: Tensor, x: Tensor) -> bool:
    """Return whether the native kernel takes both, and nothing has to see the operator."""
    if (
        MISSING
        or is_seen((mask, x), by_profiler=False)
        or not (x.is_cpu and mask.is_cpu)
        or x.is_neg()
        or mask.dtype != torch.bool
    ):
        return False
    return x.dtype.is_floating_point and x.itemsize > 1 and x.layout == torch.strided and x.shape == mask.shape


@custom_op("nmcompile::prune", fake=lambda x: torch.empty_like(x), tags=ANY_STRIDES)
def prune(
    x: Tensor, operator: str, n_keep: int, block: int, axis: str, channel_dim: int, key: Tensor | None = None
) -> Tensor:
    """Prune `x` by a named reference operator along an axis (see `grouped`).

    As a custom operator it is neither traced by `torch.compile` nor rounded differently.
    """
    view, dim, restore = grouped(x, axis, channel_dim, block)
    pruned = restore(OPERATORS[operator].prune(view, NMPattern(n_keep, block), dim, key))
    return like(pruned, x)


@custom_op("nmcompile::prune_mask", fake=lambda x: torch.empty_like(x, dtype=torch.bool))
def prune_mask(x: Tensor, operator: str, n_keep: int, block: int, channel_dim: int) -> Tensor:
    """Return the mask, bool of the shape of `x`, that a greedy operator keeps along channels."""
    return like(OPERATORS[operator].mask(x, NMPattern(n_keep, block), channel_dim), x)


def to_grid(x: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """Return `x` on its grid, in its own dtype: the nearest integer multiple of `step` that the grid has."""
    grid = Grid(bits, signed)
    return like((integers(x, step, grid) * step).to(x.dtype), x)


def to_accumulator(bias: Tensor, input_step: Tensor, weight_step: Tensor) -> Tensor:
    """Round `(out,)` to whole steps of the integer accumulator: input step × weight step, one or one per row."""
    step = input_step.double() * weight_step.double().reshape(-1)
    return ((bias.double() / step).round() * step).to(bias.dtype)


def beyond_grid(x: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """Return int8: 1 where `x` is clipped from above, -1 where from below, 0 elsewhere."""
    grid = Grid(bits, signed)
    return (x > grid.high * step).to(torch.int8) - (x < grid.low * step).to(torch.int8)


def inside_grid(gradient: Tensor, beyond: Tensor) -> Tensor:
    """Return the straight-through gradient: zero where the grid clips."""
    return apply_mask(gradient, beyond == 0)


def step_gradient(gradient: Tensor, beyond: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """Return the step's gradient, 0-d: the clip's (PACT: the sum over the clipped elements) times clip / step."""
    wide = torch.promote_types(gradient.dtype, step.dtype)
    return (gradient * beyond).sum(dtype=wide).to(step) * Grid(bits, signed).high


def like(result: Tensor, x: Tensor) -> Tensor:
    """Return `result` with the strides of `torch.empty_like(x)`."""
    if x.is_contiguous() and result.stride() == x.stride():
        return result  # the usual case, without a tensor to compare with
    wanted = torch.empty_like(x, dtype=result.dtype)
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


def gemm_forward(input: Tensor, weight: Tensor) -> Tensor:
    """Compute Y = X Wᵀ, or the convolution of X with W."""
    raise LoweringError("a gemm_forward node was executed, but no backend has lowered it")


def gemm_backward(grad_output: Tensor, weight: Tensor, input: Tensor | None = None) -> Tensor:
    """Compute dX = dY W; a convolution also takes its input, for the shape and memory format of dX."""
    raise LoweringError("a gemm_backward node was executed, but no backend has lowered it")


def gemm_update(grad_output: Tensor, input: Tensor) -> Tensor:
    """Compute dW = dYᵀ X."""
    raise LoweringError("a gemm_update node was executed, but no backend has lowered it")


def add_bias(output: Tensor, bias: Tensor) -> Tensor:
    """Compute Y + b."""
    raise LoweringError("an add_bias node was executed, but no backend has lowered it")


def bias_gradient(grad_output: Tensor) -> Tensor:
    """Compute db, the sum of the unpruned dY over everything except channels."""
    raise LoweringError("a bias_gradient node was executed, but no backend has lowered it")


def add_node(graph: fx.Graph, meta: NodeMeta, name: str, target: Target, args: tuple[Argument, ...]) -> fx.Node:
    """Append a node with the record that later passes, backends and reports read."""
    node = graph.create_node("call_function", target, args, {}, name=name)
    node.meta[KEY] = meta
    return node


def replace_node(node: fx.Node, target: Target, args: tuple[Argument, ...]) -> None:
    """Give a node another target and arguments; name, users and meta stay."""
    node.target = target
    node.args = args
    node.kwargs = {}
