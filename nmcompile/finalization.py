"""The plain model with its pruning and quantization made real in the weights."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmcompile.checks import check_compiled
from nmcompile.compilation import bypassed_layers, restore_all
from nmcompile.errors import PassError, StateError
from nmcompile.ir.modules import FINALIZED, RECORD
from nmcompile.ir.operations import apply_mask, to_accumulator, to_grid
from nmcompile.ir.shards import gathered
from nmcompile.ir.three_gemm import GemmTriple
from nmcompile.ir.unsharded import unsharded_copy
from nmcompile.training.state import masks_among, triples_of


@torch.no_grad()
def finalize(compiled: nn.Module) -> nn.Module:
    """The plain model, a copy, whose weights are zero where the current masks say so, and on their grid if quantized.

    Biases of layers with integer weights and inputs are whole steps of their accumulator, as those layers add them.

    Args:
        compiled: a model that `compile` made, also inside others (DDP, an average, a parent module), which stay. Of one
            that is split by FSDP2 or tensor parallelism every process has to call, and gets the whole plain model.

    Raises:
        PassError: a pruned weight is computed in forward (a standardized weight, say), so that no parameter can hold
            its zeros.
        StateError: a part of a compiled model.

    Warns:
        UserWarning: a layer that the model ran without calling, and whose weight other code seems to read: it runs
            dense there, and stays so.
    """
    check_compiled("compiled", compiled)
    plain = unsharded_copy(compiled)
    for root in [module for module in plain.modules() if RECORD in module.__dict__]:
        _finalize(root)
    if any(triples_of(plain)):
        raise StateError(
            f"{type(compiled).__name__} is a part of a compiled model, which alone knows the names of its weights; "
            "finalize the whole model and take the part from it"
        )
    return plain


def _finalize(root: nn.Module) -> None:
    bypassed = bypassed_layers(root)
    if bypassed:
        listed = "; ".join(f"{name!r}: {why}" for name, why in bypassed.items())
        warnings.warn(f"left as they are, since the model ran without calling them: {listed}", stacklevel=4)
    layers = [triple for triple in triples_of(root) if triple.layer.name not in bypassed]
    masks = masks_among(layers)
    effective = {triple.site.weight: _effective(root, triple) for triple in layers if _changes(triple)}
    effective |= dict(_rounded_biases(root))
    restore_all(root)
    for name, values in effective.items():
        _write(root, name, values)
    root.__dict__[FINALIZED] = masks


@torch.no_grad()
def effective_weight(model: nn.Module, triple: GemmTriple) -> Tensor | None:
    """The weight as the forward GEMM reads it; None where it is computed inside a forward."""
    weight = stored_weight(model, triple)
    if weight is None:
        return None
    # A mask that is computed tells that its layer ran.
    mask = triple.mask
    found = None if mask is None else mask.current(weight) if triple.called else mask.preview(weight)
    pruned = weight if found is None else apply_mask(weight, found)
    step, grid = triple.steps.of_weight(weight), triple.steps.weight_grid
    return pruned if step is None or grid is None else to_grid(pruned, step, grid.bits, grid.signed)


def stored_weight(model: nn.Module, triple: GemmTriple) -> Tensor | None:
    """The dense weight of a layer, parametrizations computed; None where it is computed inside a forward."""
    path, _, attribute = triple.site.weight.rpartition(".")
    if triple.site.is_expression and not parametrize.is_parametrized(model.get_submodule(path), attribute):
        return None
    return named_weight(model, triple.site.weight)


def named_weight(model: nn.Module, name: str) -> Tensor | None:
    """Return the tensor of a full name, computed where it is parametrized, gathered where it is split; or None."""
    path, _, attribute = name.rpartition(".")
    try:
        weight = getattr(model.get_submodule(path), attribute, None)
    except AttributeError:
        return None
    return gathered(weight) if isinstance(weight, Tensor) else None


def _changes(triple: GemmTriple) -> bool:
    return triple.mask is not None or triple.steps.weight_grid is not None


def _effective(model: nn.Module, triple: GemmTriple) -> Tensor:
    weight, stored = effective_weight(model, triple), stored_weight(model, triple)
    if triple.mask is not None and stored is not None:
        triple.mask.current(stored)
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
        module.__class__ = _own_class(module)
        # Without gradients torch would leave a plain tensor instead of a parameter.
        with torch.enable_grad():
            parametrize.remove_parametrizations(module, attribute)
    getattr(module, attribute).copy_(weight)


def _own_class(module: nn.Module) -> type[nn.Module]:
    """A class like the module's, which it does not share with what it was copied from.

    A parametrized weight is a property of the class, and is taken from there when the parametrization is removed.
    """
    shared = type(module)
    return type(shared.__name__, shared.__bases__, dict(vars(shared)))
