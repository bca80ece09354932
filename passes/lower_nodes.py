"""Replace GEMM, prune and bias nodes by those of a backend.

gemm_forward(input, weight_pruned)  ->  torch.nn.functional.linear(input, weight_pruned, bias)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from nmcompile.errors import LoweringError
from nmcompile.ir.node_meta import Refusal, meta_of, nodes_of_kind, update_meta
from nmcompile.ir.program import Program
from nmcompile.ir.protocols import OTHER_KIND, Backend


@dataclass(frozen=True)
class LowerNodes:
    """A pass that gives each node to the first of `backends` that supports it; `NodeMeta.backend` names that one.

    The last backend has to take everything. `NodeMeta.refusals` keeps the reasons of the others.
    """

    backends: tuple[Backend, ...]
    name: ClassVar[str] = "lower-nodes"

    def run(self, program: Program) -> None:
        for three in program.layers.values():
            for _, module in three:
                _lower(module, self.backends)


def _lower(module: fx.GraphModule, backends: Sequence[Backend]) -> None:
    # GEMMs first: a backend may fuse the nodes around them.
    for node in (*nodes_of_kind(module.graph, "gemm"), *nodes_of_kind(module.graph, "prune", "bias")):
        if not node._erased:
            _choose(node, backends).lower(node)
    module.graph.lint()
    module.recompile()


def _choose(node: fx.Node, backends: Sequence[Backend]) -> Backend:
    meta, refusals = meta_of(node), list[Refusal]()
    for backend in backends:
        support = backend.supports(node)
        if support.ok:
            told = tuple(one for one in refusals if one.reason != OTHER_KIND.reason)
            update_meta(node, backend=backend.name, refusals=told)
            return backend
        refusals.append(Refusal(meta.kind, backend.name, support.reason))
    raise LoweringError(
        f"layer {meta.layer.name!r}: no backend takes its {meta.phase.value} node {node.name!r} "
        f"({'; '.join(f'{one.backend}: {one.reason}' for one in refusals)}); add the reference backend last"
    )
