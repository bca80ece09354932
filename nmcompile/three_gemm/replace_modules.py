"""Put the three-GEMM graphs of a program to work in a module tree.

nn.Linear          ->  ThreeGemmLinear, the same object with another class
F.linear(x, W)     ->  its class's forward, whose products run as layers, where no graph can replace it
nn.BatchNorm2d     ->  AbsorbedBatchNorm2d, where it alone reads a quantized layer
y = F.linear(...)  ->  y = run_three_gemm(self.three_gemms, "linear", ...) in a generated forward
"""

from collections.abc import Mapping

from torch import fx, nn

from nmcompile.errors import PreconditionError
from nmcompile.ir.calls import match_call
from nmcompile.ir.captured import Site
from nmcompile.ir.program import Program
from nmcompile.three_gemm.absorbed_norm import absorb
from nmcompile.three_gemm.attention import ThreeGemmAttention
from nmcompile.three_gemm.by_hand import BY_HAND
from nmcompile.three_gemm.conv_transpose import ThreeGemmConvTranspose
from nmcompile.three_gemm.modules import ThreeGemm, ThreeGemmLayer, install, install_graph, run_three_gemm
from nmcompile.three_gemm.recurrent import ThreeGemmRecurrent
from nmcompile.three_gemm.recurrent_cells import ThreeGemmCell
from nmcompile.three_gemm.routed import install_routes
from nmcompile.three_gemm.router import Route
from nmcompile.three_gemm.triple import GemmTriple


def replace_modules(model: nn.Module, program: Program, triples: Mapping[str, GemmTriple]) -> None:
    """Rewrite the modules of `model` in place; the steps that can fail come first, so nothing is left half changed.

    Args:
        model: the tree that `program` was captured from, or one with the same names.
        program: with its graphs lowered.
        triples: by layer name, the running form of the rewritten layers.
    """
    by_module: dict[str, dict[str, Site]] = {}
    for site in program.captured.sites:
        if site.layer.name in triples:
            by_module.setdefault(site.module, {})[site.role] = site
    traces = program.captured.traces
    graphs = {name: rewrite_calls(traces[name], by_module[name]) for name in by_module if name in traces}
    captured = program.captured
    routed = {
        name: routes for name in captured.routes if (routes := _routes(program, name, captured.routes[name], triples))
    }
    by_hand = {name: methods for name in captured.by_hand if (methods := _methods(program, name, triples))}
    for name in (*routed, *by_hand):
        by_module.setdefault(name, {})
    for name, methods in by_hand.items():
        model.get_submodule(name).__dict__[BY_HAND] = methods
    for name, sites in by_module.items():
        module = model.get_submodule(name)
        roles = {role: triples[site.layer.name] for role, site in sites.items()}
        if name in graphs:
            install_graph(module, graphs[name], roles)
        elif name in routed:
            install_routes(module, routed[name], roles, name not in program.captured.untraced)
        else:
            install(module, _mixin(module) if roles else ThreeGemm, roles)
    for plan in program.plan:
        if plan.rewritten and plan.norm:
            absorb(model.get_submodule(plan.norm), model.get_submodule(program.site(plan.layer.name).module))


def _methods(program: Program, module: str, triples: Mapping[str, GemmTriple]) -> dict[str, dict[str, Route]]:
    """Return the routes of the methods that may multiply by the weights of layers that are not dense."""
    sparse = {name: triple for name, triple in triples.items() if not triple.is_dense}
    methods = program.captured.by_hand[module].items()
    return {name: routes for name, layers in methods if (routes := _routes(program, module, layers, sparse))}


def _routes(
    program: Program, module: str, layers: Mapping[str, str], triples: Mapping[str, GemmTriple]
) -> dict[str, Route]:
    """Return the routes from a module's code to the layers that are rewritten, by the weight's name in the module."""
    prefix = f"{module}." if module else ""
    sites = {weight: program.site(layer) for weight, layer in layers.items() if layer in triples}
    return {
        weight.removeprefix(prefix): (f"{site.module}.".removeprefix(prefix).rstrip("."), site.role)
        for weight, site in sites.items()
    }


def _mixin(module: nn.Module) -> type[ThreeGemm]:
    """Return the mixin whose forward fits a module that is a layer, attention, or recurrent."""
    if isinstance(module, nn.MultiheadAttention):
        return ThreeGemmAttention
    if isinstance(module, nn.RNNBase):
        return ThreeGemmRecurrent
    if isinstance(module, nn.RNNCellBase):
        return ThreeGemmCell
    return ThreeGemmConvTranspose if isinstance(module, nn.modules.conv._ConvTransposeNd) else ThreeGemmLayer


def rewrite_calls(trace: fx.Graph, sites: Mapping[str, Site]) -> fx.Graph:
    """Return a copy of a module's graph that calls its three-GEMM layers by role."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(trace, copies))
    graph.set_codegen(trace._codegen)
    for original in [node for node in trace.nodes if node.name in sites]:
        node = copies[original]
        call = match_call(node)
        if call is None:
            raise PreconditionError(
                f"node {original.name!r} of layer {sites[original.name].layer.name!r} is not a conv or linear"
            )
        with graph.inserting_before(node):
            holder = graph.create_node("get_attr", "three_gemms")
        node.target = run_three_gemm
        node.args = holder, original.name, call.input, call.weight, call.arguments.get("bias")
        node.kwargs = {}
    return graph
