"""Collection of what exporters write from a compiled model: each layer's weight, and the steps on its activations."""

import torch
from torch import nn

from nmcompile.config import Phase
from nmcompile.errors import ExportError, PassError
from nmcompile.export.deployed_layer import DeployedActivation, DeployedLayer, DeployedWeight
from nmcompile.ir.captured import Site
from nmcompile.ir.plan import Operand
from nmcompile.pruning.pattern import NMPattern
from nmcompile.three_gemm.effective_weight import effective_weight
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.grid_steps import ActivationStep
from nmcompile.three_gemm.record import bypassed_layers, record_of
from nmcompile.three_gemm.stored_weights import is_computed_in_forward, named_weight, stored_weight
from nmcompile.three_gemm.triple import GemmTriple


@torch.no_grad()
def deployed_layers(compiled: nn.Module) -> dict[str, DeployedLayer]:
    """Return every layer of a compiled model by name, including those that the plan left unchanged.

    Raises:
        CalibrationError: an input is to be quantized, but not calibrated.
        PassError: a weight is computed in forward.
        ExportError: an input is pruned by magnitude, and may be negative.
    """
    root, record = record_of(compiled)
    captured = record.program.captured
    bypassed = {**captured.bypassed, **bypassed_layers(root)}
    # Dense products that code makes in its own way stay as they are, and so do fused recurrent layers.
    routed = {layer for layers in captured.routes.values() for layer in layers.values()}
    layers = [triple for triple in triples_of(root) if triple.layer.name not in bypassed]
    layers = [triple for triple in layers if not (triple.is_dense and triple.layer.name in routed)]
    for triple in layers:
        _check_input(triple, captured.facts[triple.layer.name].nonnegative)
    rewritten = {triple.layer.name: _deployed(root, triple) for triple in layers}
    aside = routed | captured.recurrent | bypassed.keys()
    left = [site for site in captured.sites if site.layer.name not in aside and not site.is_expression]
    return {site.layer.name: _plain(root, site) for site in left} | rewritten


def _check_input(triple: GemmTriple, nonnegative: bool) -> None:
    row = triple.graphs.plan.find(Phase.FORWARD, "input")
    if row is not None and row.operator != "greedy_by_value" and not nonnegative:
        raise ExportError(
            f"layer {triple.layer.name!r}: its input, which may be negative, is pruned {row.pattern} {row.operator}, "
            "and files prune by value; give the layer an input that follows a ReLU, or LayerConfig(input=None)"
        )


def _deployed(model: nn.Module, triple: GemmTriple) -> DeployedLayer:
    pattern, grid = _pattern(triple, "weight"), triple.steps.weight_grid
    values, dense = effective_weight(model, triple), stored_weight(model, triple.site)
    if values is None or dense is None or is_computed_in_forward(model, triple.site):
        raise PassError(
            f"layer {triple.layer.name!r}: its weight is computed in forward, so no file can hold it; leave it "
            f"dense with CompileConfig(layers={{{triple.layer.name!r}: None}})"
        )
    weight = DeployedWeight(triple.site.weight, pattern, values, grid, triple.steps.of_weight(dense))
    steps = triple.steps
    input, output = _activation(triple, "input", steps.input), _activation(triple, "output", steps.output)
    return DeployedLayer(triple.site.layer, weight, input, output, triple.graphs.plan.norm, triple.site.module)


def _plain(model: nn.Module, site: Site) -> DeployedLayer:
    weight = named_weight(model, site.weight)
    assert weight is not None
    return DeployedLayer(site.layer, DeployedWeight(site.weight, None, weight.detach()), module=site.module)


def _activation(triple: GemmTriple, operand: Operand, step: ActivationStep | None) -> DeployedActivation:
    pattern = _pattern(triple, operand)
    if step is None:
        return DeployedActivation(pattern)
    step.check()
    return DeployedActivation(pattern, step.grid, float(step.current()))


def _pattern(triple: GemmTriple, operand: Operand) -> NMPattern | None:
    row = triple.graphs.plan.find(Phase.FORWARD, operand)
    return None if row is None else row.pattern
