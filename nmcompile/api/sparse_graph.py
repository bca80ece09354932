"""Compilation of one graph of Dynamo: planned like a model, and run with the masks of the parameters that arrive."""

import copy
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx, nn
from torch.utils.weak import TensorWeakRef

from nmcompile.api.choose_backends import choose_backends
from nmcompile.api.pipeline import lowered
from nmcompile.api.torch_options import Options
from nmcompile.capture import capture_model
from nmcompile.capture.dynamo_graph import DynamoGraph, Part
from nmcompile.capture.names import join, operator_name
from nmcompile.capture.rename_layers import rename_layers
from nmcompile.config import CompileConfig, preset
from nmcompile.errors import CaptureError
from nmcompile.ir.captured import Captured, Facts, Site
from nmcompile.ir.program import Program
from nmcompile.planning.plan_phases import plan_phases
from nmcompile.three_gemm.modules import install_graph
from nmcompile.three_gemm.record import RECORD, Compilation
from nmcompile.three_gemm.replace_modules import rewrite_calls
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.training.bind_layers import TripleFactory
from nmcompile.training.earlier import Earlier
from nmcompile.training.optimizer_hooks import watch_optimizers
from nmcompile.training.parameter_masks import ParameterMasks, masks_under

COMPUTED = "its weight is computed in forward, and masks belong to parameters; nmcompile.compile prunes it"


live_graphs: "weakref.WeakKeyDictionary[nn.Module, tuple[TensorWeakRef, ...]]" = weakref.WeakKeyDictionary()
"""The graphs that were made sparse, with the parameters that each was made for."""


def sparse_graph(gm: fx.GraphModule, graph: DynamoGraph, options: Options) -> nn.Module:
    """Return a module that computes a graph of Dynamo sparsely; without a layer, the graph itself."""
    try:
        captured = capture_model(graph.model)
    except CaptureError:
        return fx.GraphModule(gm, gm.graph)
    masks = masks_under(options.key)
    captured = settled(graph, captured, masks)
    config = config_for(options.config, captured)
    plan = plan_phases(captured, preset(options.mode), config)
    backends = choose_backends(options.kernels, graph.model)
    program = lowered(captured, plan, backends)
    with torch.inference_mode(False), torch.no_grad():
        factory = TripleFactory(graph.model, program, config, torch.initial_seed(), Earlier())
        triples = masks.bind(factory, graph.model)
    watch_optimizers()
    result = install(gm, graph, program, triples)
    result.__dict__[RECORD] = Compilation(program, options.mode, config, backends)
    live_graphs[result] = tuple(map(TensorWeakRef, graph.model.parameters()))
    return result


def settled(graph: DynamoGraph, captured: Captured, masks: ParameterMasks) -> Captured:
    """Return the captured graph with the names of the model's layers, and what earlier graphs decided on them."""
    calls, sites = Counter[str](), dict[str, Site]()
    facts, bypassed, tied = dict[str, Facts](), dict[str, str](), dict[str, str]()
    for site in captured.sites:
        old = site.layer.name
        if site.is_expression:
            bypassed[old] = COMPUTED
            continue
        parameter = graph.model.get_parameter(site.weight)
        weight, seen = graph.names[id(parameter)], captured.facts[old]
        seen = seen if graph.is_whole else replace(seen, first=False, last=False)
        seen = replace(seen, positions=graph.parts[site.module].positions(site))
        name, seen = masks.settle(parameter, weight.removesuffix(".weight"), seen)
        calls[name] += 1
        name = name if calls[name] == 1 else f"{name}.{calls[name] - 1}"
        sites[old] = replace(site, layer=replace(site.layer, name=name), weight=weight)
        facts[name] = seen
        if reader := embedding_of(graph.model, weight):
            tied[name] = reader
    renamed = rename_layers(replace(captured, bypassed={**captured.bypassed, **bypassed}), sites)
    return replace(renamed, facts={**renamed.facts, **facts}, tied={**renamed.tied, **tied})


def config_for(config: CompileConfig, captured: Captured) -> CompileConfig:
    """Return the config for the layers of one graph; a numbered name of a layer follows the plain one."""
    kept = config.restricted_to((site.layer.name, site.weight) for site in captured.sites)
    plain = {site.layer.name: site.layer.name.partition("#")[0] for site in captured.sites}
    named = {name: config.layers[one] for name, one in plain.items() if one in config.layers}
    return replace(kept, layers={**kept.layers, **named})


def embedding_of(model: fx.GraphModule, weight: str) -> str:
    """Return the name of the embedding that reads a weight, or ""."""
    nodes = (node for node in model.graph.find_nodes(op="get_attr") if node.target == weight)
    is_read = any(operator_name(user) == "embedding" for node in nodes for user in node.users)
    return weight.removesuffix(".weight") if is_read else ""


def install(gm: fx.GraphModule, graph: DynamoGraph, program: Program, triples: Mapping[str, GemmTriple]) -> nn.Module:
    """Return a module that runs the layers of Dynamo's graph by these, with the same inputs."""
    result = _shell(gm, "", graph.parts)
    for name, part in graph.parts.items():
        sites = {s.role: s for s in program.captured.sites if s.module == name and s.layer.name in triples}
        if sites:
            function = rewrite_calls(part.as_function(program.captured.traces[name]), sites)
            roles = {role: triples[site.layer.name] for role, site in sites.items()}
            install_graph(result.get_submodule(name), function, roles)
    return result


def _shell(gm: fx.GraphModule, name: str, parts: Mapping[str, Part]) -> fx.GraphModule:
    """Return a copy of a graph module and of the graphs in it that are parts; tensors and other values are shared."""
    result = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for child, module in gm.named_children():
        if join(name, child) in parts:
            assert isinstance(module, fx.GraphModule)
            setattr(result, child, _shell(module, join(name, child), parts))
    return result
