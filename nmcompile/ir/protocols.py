"""The two contracts for extensions: a pass and a backend."""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import fx

from nmcompile.ir.program import Program


@dataclass(frozen=True)
class Support:
    """Answer whether a backend supports something, and the reason."""

    ok: bool
    reason: str = ""


OTHER_KIND = Support(False, "it has no kernels for nodes of this kind")
"""Answer of a backend to nodes that it never takes. The report omits it, as it says nothing about a layer."""


class Pass(Protocol):
    """One rewrite of a `Program`. Fields of the frozen dataclass are its options."""

    name: ClassVar[str]

    def run(self, program: Program) -> None:
        """Rewrite the program in place, as its plan says; `verify_graphs` checks the result against the plan.

        Raises:
            PreconditionError: the program is not in the state that the pass needs.
        """


@runtime_checkable
class Backend(Protocol):
    """A set of kernels that replace nodes of the three graphs, one node at a time."""

    @property
    def name(self) -> str:
        """Return the backend's name in plans, reports and `compile(backend=...)`."""

    def available(self) -> Support:
        """Return whether this machine can run the backend; never raise, and import nothing heavy at module level."""

    def supports(self, node: fx.Node) -> Support:
        """Return whether `lower` can take this node (kind `gemm`, `prune` or `bias`), and why not; see `OTHER_KIND`."""

    def lower(self, node: fx.Node) -> None:
        """Replace the node in its graph; its `NodeMeta` moves to the replacement."""
