"""Models that torch.compile runs through the backend `"nmcompile"`: their graphs as one compilation, and their end."""

import copy
import sys
from dataclasses import replace
from typing import Any

from torch import nn

from nmcompile.api.sparse_graph import live_graphs
from nmcompile.capture.sites import is_layer
from nmcompile.fingerprint import fingerprint
from nmcompile.ir.captured import Captured
from nmcompile.ir.plan import Plan
from nmcompile.ir.program import Program
from nmcompile.three_gemm.record import RECORD, Compilation
from nmcompile.training.finalized import FINALIZED, Finalized
from nmcompile.training.parameter_masks import masks_by_graphs

PYTHON = "Dynamo left it in Python, or no graph with it has been compiled yet"


def own_module(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile wraps."""
    dynamo = sys.modules.get("torch._dynamo")
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._orig_mod
    return model


def graphs_of(model: nn.Module) -> list[nn.Module]:
    """Return the compiled graphs that read parameters of a model, in the order in which they were made."""
    held = set(map(id, model.parameters()))
    return [graph for graph, references in live_graphs.items() if any(id(one()) in held for one in references)]


def finalize_graphs(model: nn.Module) -> nn.Module:
    """Return a plain copy of a model whose weights are pruned by the masks of its graphs."""
    plain, masks = copy.deepcopy(own_module(model)), masks_by_graphs(own_module(model))
    for name, mask in masks.items():
        weight = own_module(model).get_parameter(name)
        mask.name = name  # its graph knew the name in a part of the model
        kept = mask.current(weight, fingerprint(weight))
        plain.get_parameter(name).masked_fill_(~kept, 0)
    plain.__dict__[FINALIZED] = Finalized({name: (mask, None) for name, mask in masks.items()}, {})
    return plain


def merged(model: nn.Module) -> Compilation:
    """Return the graphs of a model as one compilation, in which each layer is that of its first graph."""
    records: list[Compilation] = [graph.__dict__[RECORD] for graph in graphs_of(own_module(model))]
    first = records[0].program
    known, sites, plans = set[str](), [], []
    for record in records:
        program = record.program
        sites += [site for site in program.captured.sites if site.layer.name not in known]
        plans += [plan for plan in program.plan if plan.layer.name not in known]
        known |= {plan.layer.name for plan in program.plan}
    captured = replace(first.captured, sites=tuple(sites), **_joined([one.program.captured for one in records]))
    seen = {id(one()) for graph in graphs_of(model) for one in live_graphs[graph]}
    modules = ((name, module) for name, module in own_module(model).named_modules() if is_layer(module))
    python = {name: PYTHON for name, module in modules if not seen & set(map(id, module.parameters()))}
    captured = replace(captured, python={**captured.python, **python}, traces={})
    if len(records) > 1:
        captured = replace(captured, whole=None, whole_reason=f"torch.compile made {len(records)} graphs of the model")
    layers = {name: graphs for record in reversed(records) for name, graphs in record.program.layers.items()}
    return replace(records[0], program=Program(captured, Plan(tuple(plans)), layers))


def _joined(parts: list[Captured]) -> dict[str, Any]:
    """Return the facts on layers of all graphs, of which those of the first graph with a layer hold."""
    names = "facts", "behind", "bypassed", "suspected", "tied", "python", "uncaptured", "parameters"
    return {name: {key: one for part in reversed(parts) for key, one in getattr(part, name).items()} for name in names}
