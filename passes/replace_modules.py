"""Put the three-GEMM graphs of a program to work in a module tree.

    nn.Linear          ->  ThreeGemmLinear, the same object with another class
    y = F.linear(...)  ->  y = run_three_gemm(self.three_gemms, "linear", ...) in a generated forward
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from nmcompile.ir.attention import ThreeGemmAttention
from nmcompile.ir.captured import Site
from nmcompile.ir.functional import operands_of
from nmcompile.ir.modules import ThreeGemmLayer, install, install_graph, run_three_gemm
from nmcompile.ir.program import Program
from nmcompile.ir.three_gemm import GemmTriple

Triples = Mapping[str, GemmTriple]


def replace_modules(model: nn.Module, program: Program, make_triple: Callable[[Site], GemmTriple]) -> None:
    """Rewrite the modules of `model` in place; what cannot fail comes first, so that nothing is left half changed.

    Args:
        model: the tree that `program` was captured from, or one with the same names.
        program: with its graphs lowered.
        make_triple: the running form of a site's graphs.
    """
    by_module: dict[str, dict[str, Site]] = {}
    for site in program.captured.sites:
        if next(plan for plan in program.plan if plan.layer.name == site.layer.name).rewritten:
            by_module.setdefault(site.module, {})[site.role] = site
    triples = {name: {role: make_triple(site) for role, site in sites.items()} for name, sites in by_module.items()}
    graphs = {
        name: _rewrite_calls(program.captured.traces[name], sites)
        for name, sites in by_module.items()
        if name in program.captured.traces
    }
    for name, roles in triples.items():
        module = model.get_submodule(name)
        if name in graphs:
            install_graph(module, graphs[name], roles)
        else:
            install(module, ThreeGemmAttention if isinstance(module, nn.MultiheadAttention) else ThreeGemmLayer, roles)


def _rewrite_calls(trace: fx.Graph, sites: Mapping[str, Site]) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output: Any = graph.graph_copy(trace, copies)
    graph.output(output)
    graph.set_codegen(trace._codegen)
    for node in [copies[node] for node in trace.nodes if node.name in sites]:
        role = next(original.name for original, copied in copies.items() if copied is node)
        with graph.inserting_before(node):
            holder = graph.create_node("get_attr", "three_gemms")
        input, weight, bias = operands_of(node)
        node.target = run_three_gemm
        node.args, node.kwargs = (holder, role, input, weight, bias), {}
    graph.lint()
    return graph
