"""The two contracts that others implement: a pass and a backend."""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import fx

from nmcompile.ir.program import Program


@dataclass(frozen=True)
class Support:
    """Whether a backend can do a thing, and why (not)."""

    ok: bool
    reason: str = ""


OTHER_KIND = Support(False, "it has no kernels for nodes of this kind")
"""A backend's answer to nodes that it never takes; the report leaves it out, as it says nothing of a layer."""


class Pass(Protocol):
    """One rewrite of a `Program`. Fields of the frozen dataclass are its options."""

    name: ClassVar[str]

    def run(self, program: Program) -> None:
        """Rewrite the program in place, as its plan says; `verify_graphs` holds the result against the plan.

        Raises:
            PreconditionError: the program is not in the state that the pass needs.
        """


@runtime_checkable
class Backend(Protocol):
    """Replaces nodes of the three graphs by its own, one node at a time."""

    @property
    def name(self) -> str:
        """How plans, reports and `compile(backend=...)` call it."""

    def available(self) -> Support:
        """Whether this machine can run the backend; never raises, imports nothing heavy at module level."""

    def supports(self, node: fx.Node) -> Support:
        """Whether `lower` can take this node (kind `gemm`, `prune` or `bias`), and why not; see `OTHER_KIND`."""

    def lower(self, node: fx.Node) -> None:
        """Replace the node in its graph; its `NodeMeta` moves to the replacement."""
