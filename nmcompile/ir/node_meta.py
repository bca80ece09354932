"""The record that every call node of the three graphs carries: `NodeMeta`, under one key of fx's `node.meta`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, fx

from nmcompile.config import Phase
from nmcompile.ir.choice_slot import ChoiceSlot
from nmcompile.ir.layers import Layer
from nmcompile.ir.plan import PlanRow

KEY = "nmcompile"

Kind = Literal["prune", "quantize", "gemm", "bias", "view"]
"""The work of a node; `view` is for masks, casts and the like between the other four."""


@dataclass(frozen=True)
class Refusal:
    """A backend that did not take a kind of node, and its reason."""

    kind: Kind
    backend: str
    reason: str


@dataclass(frozen=True)
class Fused:
    """The pruning of an operand that a GEMM performs itself.

    Args:
        row: the plan row of the node that is gone.
        operand: computes the pruned operand from the arguments of the GEMM.
    """

    row: PlanRow
    operand: Callable[..., Tensor]


@dataclass(frozen=True)
class NodeMeta:
    """The work of a node, and where it belongs.

    Args:
        kind, layer, phase: set when the node is made.
        row: the plan row that a prune or quantize node carries out.
        backend: the name of the backend that took the node; empty before lowering.
        refusals: those of the backends that were asked before it.
        fused: the pruning that a GEMM does itself.
        mask_kernel: the operator that computes the mask of a weight, `"namespace::name"`; empty for the reference.
        choice: the slot for the kernel that a GEMM ran last; only if a backend chooses at run time.
    """

    kind: Kind
    layer: Layer
    phase: Phase
    row: PlanRow | None = None
    backend: str = ""
    refusals: tuple[Refusal, ...] = ()
    fused: Fused | None = None
    mask_kernel: str = ""
    choice: ChoiceSlot | None = None

    @property
    def planned(self) -> PlanRow | None:
        """Return the plan row that the node carries out, fused into it or not."""
        return self.row if self.fused is None else self.fused.row


def meta_of(node: fx.Node) -> NodeMeta:
    """Return the record of a call node."""
    meta: NodeMeta = node.meta[KEY]
    return meta


def find_meta(node: fx.Node) -> NodeMeta | None:
    """Return the record of any node; placeholders and outputs have none."""
    return node.meta.get(KEY)


def kind_of(node: fx.Node) -> Kind | None:
    """Return the kind of a call node."""
    meta = find_meta(node)
    return None if meta is None else meta.kind


def row_of(node: fx.Node) -> PlanRow | None:
    """Return the plan row that a node carries out by itself."""
    meta = find_meta(node)
    return None if meta is None else meta.row


def nodes_of_kind(graph: fx.Graph, *kinds: Kind) -> Iterator[fx.Node]:
    """Yield the nodes of some kinds, in the order of the graph."""
    return (node for node in graph.nodes if kind_of(node) in kinds)


def update_meta(node: fx.Node, **changes: Any) -> None:
    """Replace fields of a node's record."""
    node.meta[KEY] = replace(meta_of(node), **changes)
