"""The plain model with its pruning and quantization applied to the weights."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from nmcompile.api.compiled_graphs import finalize_graphs, own_module
from nmcompile.api.decompile import is_compiled
from nmcompile.checks import check_compiled
from nmcompile.errors import PassError, StateError
from nmcompile.fingerprint import fingerprint
from nmcompile.ir.operations import to_accumulator
from nmcompile.three_gemm.effective_weight import effective_weight
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.record import RECORD, bypassed_layers, restore_all
from nmcompile.three_gemm.stored_weights import (
    Place,
    find_place,
    is_computed_in_forward,
    make_plain,
    named_weight,
    stored_weight,
)
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.three_gemm.unsharded import unsharded_copy
from nmcompile.training.finalized import FINALIZED, Finalized, OnGrid
from nmcompile.training.find_masks import masks_among
from nmcompile.training.parameter_masks import masks_by_graphs


@torch.no_grad()
def finalize(compiled: nn.Module) -> nn.Module:
    """Return a plain copy of the model whose weights are pruned by the current masks, and on their grid if quantized.

    A weight that a parametrization or a hook of `torch.nn.utils` computes (`weight_norm`, `spectral_norm`, `prune`)
    becomes a parameter. Biases of layers with integer weights and inputs are rounded to whole steps of their
    accumulator, as these layers add them.

    Args:
        compiled: a model that `compile` made, also inside others (DDP, an average, a parent module), which stay; or one
            that `torch.compile(backend="nmcompile")` has run: then the module that it wraps. If FSDP2 or tensor
            parallelism splits the model, every process has to call, and gets the whole plain model.

    Raises:
        PassError: a pruned weight is computed in forward and is not a slice of a parameter (a standardized weight,
            say), so no parameter can hold its zeros; or two layers share a weight and quantize it differently.
        StateError: a part of a compiled model.

    Warns:
        UserWarning: a layer that the model ran without calling, and whose weight other code seems to read: it runs
            dense there, and stays so.
    """
    check_compiled("compiled", compiled)
    if not is_compiled(compiled) and masks_by_graphs(own_module(compiled)):
        return finalize_graphs(compiled)
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
    _check_tied(root, layers)
    masks = masks_among(layers)
    effective = {triple.site.weight: _effective(root, triple) for triple in layers if _changes(triple)}
    grids = dict(_grids(root, layers))
    biases = dict(_rounded_biases(root))
    restore_all(root)
    for name, (place, values) in effective.items():
        _write(root, name, values) if place is None else place.look(root).copy_(values)
    for name, values in biases.items():
        _write(root, name, values)
    if any(place for place, _ in effective.values()):
        _check_shared(root, effective)
    obeyed = {name: (mask, effective[name][0]) for name, mask in masks.items() if name in effective}
    root.__dict__[FINALIZED] = Finalized(obeyed, grids)


def _check_tied(root: nn.Module, layers: Iterable[GemmTriple]) -> None:
    """Raise if two layers share a weight and read other values of it: on other grids, or one of them on none."""
    readers: dict[Tensor, list[GemmTriple]] = defaultdict(list)
    for triple in layers:
        weight = stored_weight(root, triple.site)
        if weight is not None:
            readers[weight].append(triple)
    for first, *others in readers.values():
        for other in others:
            values, seen = effective_weight(root, first), effective_weight(root, other)
            if values is None or seen is None or torch.allclose(values, seen, rtol=0, atol=0, equal_nan=True):
                continue
            raise PassError(
                f"layers {first.layer.name!r} and {other.layer.name!r} share the weight {first.site.weight!r}, but "
                "read other values of it as their bits differ, so one parameter cannot hold both; give them the same "
                "weight_bits in CompileConfig.layers"
            )


def _changes(triple: GemmTriple) -> bool:
    return triple.mask is not None or triple.steps.weight_grid is not None


def _effective(model: nn.Module, triple: GemmTriple) -> tuple[Place | None, Tensor]:
    """Return the place of the weight in a parameter, None if it has a name of its own, and its values."""
    site, weight, stored = triple.site, effective_weight(model, triple), stored_weight(model, triple.site)
    if triple.mask is not None and stored is not None:
        triple.mask.current(stored, fingerprint(stored))
    is_computed = is_computed_in_forward(model, site)
    place = find_place(model, site, stored) if is_computed and stored is not None else None
    if weight is None or (is_computed and place is None):
        how = "is computed in forward" if is_computed else "is set by a hook that is not one of torch.nn.utils"
        raise PassError(
            f"layer {triple.layer.name!r}: its weight {how}, so no parameter can hold its zeros; deploy the "
            f"compiled model itself, or leave it dense with CompileConfig(layers={{{triple.layer.name!r}: None}})"
        )
    return place, weight


def _grids(model: nn.Module, layers: Iterable[GemmTriple]) -> Iterator[tuple[str, OnGrid]]:
    """Yield the grid of each quantized weight, by the name of its layer."""
    for triple in layers:
        weight, grid = stored_weight(model, triple.site), triple.steps.weight_grid
        if weight is not None and grid is not None:
            step = triple.steps.of_weight(weight)
            assert step is not None
            yield triple.layer.name, OnGrid(triple.site.weight, grid, step.clone())


def _rounded_biases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, bias), each bias rounded to whole accumulator steps."""
    for triple in triples_of(model):
        input = triple.steps.input
        if not triple.graphs.plan.rounds_bias or input is None or not input.is_calibrated:
            continue
        name = ".".join(filter(None, (triple.site.module, "bias")))
        weight, bias = stored_weight(model, triple.site), named_weight(model, name)
        step = None if weight is None else triple.steps.of_weight(weight)
        if step is not None and bias is not None:
            yield name, to_accumulator(bias, input.current(), step)


def _write(model: nn.Module, name: str, weight: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    make_plain(module, attribute)
    getattr(module, attribute).copy_(weight)


def _check_shared(root: nn.Module, written: dict[str, tuple[Place | None, Tensor]]) -> None:
    """Raise if layers that are pruned differently share elements of one parameter."""
    for name, (place, values) in written.items():
        found = named_weight(root, name) if place is None else place.look(root)
        if found is not None and not torch.allclose(found, values, rtol=0, atol=0, equal_nan=True):
            raise PassError(
                f"layer {name.removesuffix('.weight')!r}: another layer uses a part of its weight, and is pruned "
                "differently, so one parameter cannot hold the zeros of both; leave one of them dense with "
                "CompileConfig.layers"
            )
