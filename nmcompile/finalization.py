"""The plain model with its pruning and quantization made real in the weights."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmcompile.errors import PassError
from nmcompile.ir.modules import RECORD, restore
from nmcompile.ir.operations import apply_mask, to_accumulator, to_grid
from nmcompile.ir.three_gemm import GemmTriple
from nmcompile.training.state import masks_of, triples_of

FINALIZED = "_nmcompile_finalized"
"""Under this name a finalized model remembers which weight obeys which pattern, for `verify`."""


@torch.no_grad()
def finalize(compiled: nn.Module) -> nn.Module:
    """The plain model, a copy, whose weights are zero where the current masks say so, and on their grid if quantized.

    Biases of layers with integer weights and inputs are whole steps of their accumulator, as those layers add them.

    Raises:
        PassError: a pruned weight is computed in forward (a standardized weight, say), so that no parameter can hold
            its zeros.
    """
    plain = copy.deepcopy(compiled)
    masks = masks_of(plain)
    effective = {triple.site.weight: _effective(plain, triple) for triple in triples_of(plain) if _changes(triple)}
    effective |= dict(_rounded_biases(plain))
    for module in plain.modules():
        restore(module)
        module.__dict__.pop(RECORD, None)
    for name, values in effective.items():
        _write(plain, name, values)
    plain.__dict__[FINALIZED] = masks
    return plain


@torch.no_grad()
def effective_weight(model: nn.Module, triple: GemmTriple) -> Tensor | None:
    """The weight as the forward GEMM reads it; None where it is computed inside a forward."""
    weight = stored_weight(model, triple)
    if weight is None:
        return None
    pruned = weight if triple.mask is None else apply_mask(weight, triple.mask.current(weight))
    step, grid = triple.steps.of_weight(weight), triple.steps.weight_grid
    return pruned if step is None or grid is None else to_grid(pruned, step, grid.bits, grid.signed)


def stored_weight(model: nn.Module, triple: GemmTriple) -> Tensor | None:
    """The dense weight of a layer, parametrizations computed; None where it is computed inside a forward."""
    path, _, attribute = triple.site.weight.rpartition(".")
    if triple.site.is_expression and not parametrize.is_parametrized(model.get_submodule(path), attribute):
        return None
    return named_weight(model, triple.site.weight)


def named_weight(model: nn.Module, name: str) -> Tensor | None:
    """The tensor behind a full name, parametrized weights computed; None if there is none."""
    path, _, attribute = name.rpartition(".")
    try:
        weight = getattr(model.get_submodule(path), attribute, None)
    except AttributeError:
        return None
    return weight if isinstance(weight, Tensor) else None


def _changes(triple: GemmTriple) -> bool:
    return triple.mask is not None or triple.steps.weight_grid is not None


def _effective(model: nn.Module, triple: GemmTriple) -> Tensor:
    weight = effective_weight(model, triple)
    if weight is None:
        raise PassError(
            f"layer {triple.layer.name!r}: its weight is computed in forward, so finalize cannot write zeros into a "
            f"parameter; leave it dense with CompileConfig(layers={{{triple.layer.name!r}: None}})"
        )
    return weight


def _rounded_biases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By name, the biases that are added in whole steps."""
    for triple in triples_of(model):
        input = triple.steps.input
        if not triple.graphs.plan.rounds_bias or input is None or not input.is_calibrated:
            continue
        name = ".".join(filter(None, (triple.site.module, "bias")))
        weight, bias = stored_weight(model, triple), named_weight(model, name)
        step = None if weight is None else triple.steps.of_weight(weight)
        if step is not None and bias is not None:
            yield name, to_accumulator(bias, input.current(), step)


def _write(model: nn.Module, name: str, weight: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if parametrize.is_parametrized(module, attribute):
        # Without gradients torch would leave a plain tensor instead of a parameter.
        with torch.enable_grad():
            parametrize.remove_parametrizations(module, attribute)
    getattr(module, attribute).copy_(weight)
