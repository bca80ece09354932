"""The unit that passes work on: a plan and the three graphs of each layer."""

import copy
import copyreg
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from nmcompile.config import Phase
from nmcompile.ir.captured import Captured, Site
from nmcompile.ir.choice import Choice
from nmcompile.ir.choice_slot import ChoiceSlot
from nmcompile.ir.generated_code import GeneratedModule
from nmcompile.ir.layers import Layer
from nmcompile.ir.node_meta import NodeMeta, Refusal, find_meta, update_meta
from nmcompile.ir.plan import LayerPlan, Plan


@dataclass
class ThreeGraphs:
    """The forward, backward and update graph of one layer.

    Placeholders are matched by name: `input`, `weight`, `bias`, `weight_mask` come from the caller, `grad_output` and
    `key` from autograd and the random stream; any other placeholder of the backward or update graph is an extra output
    of the forward graph, listed in `saved` in output order.
    """

    plan: LayerPlan
    graphs: dict[Phase, fx.GraphModule]
    saved: tuple[str, ...] = ()

    @property
    def layer(self) -> Layer:
        """Return the layer that one call runs."""
        return self.plan.layer.of_call()

    def __getitem__(self, phase: Phase) -> fx.GraphModule:
        return self.graphs[phase]

    def metas(self, phase: Phase) -> Iterator[NodeMeta]:
        """Yield the record of each call node, in the order of the graph."""
        found = (find_meta(node) for node in self[phase].graph.nodes)
        return (meta for meta in found if meta is not None)

    def kernels(self) -> dict[Phase, str]:
        """Return by phase which backend runs which kind of node: `"prune: cpu, gemm: reference"`."""
        return {
            phase: ", ".join(name for meta in self.metas(phase) for name in _kernels(meta)) for phase in self.graphs
        }

    def choices(self) -> dict[Phase, Choice]:
        """Return the kernel that each GEMM ran last, for GEMMs that ran and for which a backend chose one."""
        slots = {phase: meta.choice for phase in self.graphs for meta in self.metas(phase) if meta.choice is not None}
        return {phase: slot.latest for phase, slot in slots.items() if slot.latest is not None}

    def refusals(self) -> dict[Phase, tuple[Refusal, ...]]:
        """Return the backends that did not take a node and left it to the next one, each reason once."""
        return {
            phase: tuple(dict.fromkeys(one for meta in self.metas(phase) for one in meta.refusals))
            for phase in self.graphs
        }

    def mask_kernel(self) -> str:
        """Return the backend's operator that computes the weight's mask, `"namespace::name"`; "" for the reference."""
        return next((meta.mask_kernel for meta in self.metas(Phase.FORWARD) if meta.mask_kernel), "")

    def __iter__(self) -> Iterator[tuple[Phase, fx.GraphModule]]:
        return iter(self.graphs.items())

    def __getstate__(self) -> dict[str, object]:
        # Loading a pickled GraphModule, also the owner of a pickled graph, would trace it again: through the backends'
        # kernels, and without meta. A copy of its graph has no owner.
        return self.__dict__ | {"graphs": {phase: copy.deepcopy(module.graph) for phase, module in self}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for graph in state["graphs"].values():
            _give_own_slots(graph)
        modules = {phase: GeneratedModule(nn.Module(), graph) for phase, graph in state["graphs"].items()}
        self.__dict__.update(state | {"graphs": modules})


def _give_own_slots(graph: fx.Graph) -> None:
    """Give the nodes of a copied graph slots of their own, which start with the choices of the original."""
    for node in graph.nodes:
        meta = find_meta(node)
        if meta is not None and (shared := meta.choice) is not None:
            own = ChoiceSlot(shared.label, shared.latest)
            update_meta(node, choice=own)
            node.args = tuple(own.name if arg == shared.name else arg for arg in node.args)


def _kernels(meta: NodeMeta) -> Iterator[str]:
    if meta.fused is not None:
        yield f"prune: {meta.backend}"
    if meta.backend:
        yield f"{meta.kind}: {meta.backend}"


@dataclass
class Program:
    """A captured model, its plan, and the three graphs of every planned layer by name."""

    captured: Captured
    plan: Plan
    layers: dict[str, ThreeGraphs] = field(default_factory=dict)

    def site(self, layer: str) -> Site:
        return next(site for site in self.captured.sites if site.layer.name == layer)


def _operator(qualified_name: str, overload: str) -> torch._ops.OpOverload:
    namespace, name = qualified_name.split("::")
    operator: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return operator


# Nodes name operators, which torch cannot pickle by itself.
copyreg.pickle(torch._ops.OpOverload, lambda op: (_operator, (op._schema.name, op._overloadname)))
