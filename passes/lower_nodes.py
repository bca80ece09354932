"""Replace GEMM, prune and bias nodes by those of a backend.

gemm_forward(input, weight_pruned)  ->  torch.nn.functional.linear(input, weight_pruned, bias)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from nmcompile.errors import LoweringError
from nmcompile.ir.program import Program
from nmcompile.ir.protocols import Backend, PassResult

LOWERED = ("gemm", "prune", "bias")


@dataclass(frozen=True)
class LowerNodes:
    """Hand each node to the first of `backends` that supports it; `node.meta["backend"]` names the one that took it.

    The last backend has to take everything. What the others said is kept in `node.meta["refusals"]`.
    """

    backends: tuple[Backend, ...]
    name: ClassVar[str] = "lower-nodes"

    def run(self, program: Program) -> PassResult:
        for three in program.layers.values():
            for _, module in three:
                _lower(module, self.backends)
        return PassResult(modified=bool(program.layers))


def _lower(module: fx.GraphModule, backends: Sequence[Backend]) -> None:
    # GEMMs first: a backend may fuse the bias node that follows into its GEMM.
    nodes = sorted(module.graph.nodes, key=lambda node: node.meta.get("kind") != "gemm")
    for node in nodes:
        if node.meta.get("kind") in LOWERED and not node._erased:
            _choose(node, backends).lower(node)
    module.graph.lint()
    module.recompile()


def _choose(node: fx.Node, backends: Sequence[Backend]) -> Backend:
    refusals: dict[str, str] = {}
    for backend in backends:
        support = backend.supports(node)
        if support.ok:
            node.meta.update(backend=backend.name, refusals=refusals)
            return backend
        refusals[backend.name] = support.reason
    raise LoweringError(
        f"layer {node.meta['layer'].name!r}: no backend takes its {node.meta['phase'].value} node {node.name!r} "
        f"({'; '.join(f'{name}: {reason}' for name, reason in refusals.items())}); add the reference backend last"
    )
