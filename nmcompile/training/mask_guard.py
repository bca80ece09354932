"""The guard that looks after a mask before each call of a graph that torch.compile made.

Dynamo checks its guards before each call, and asks an opaque object for the values to compare. The answer is always
the same, but the mask is rebuilt on the way if it is stale. So the graph only reads a mask: it writes no tensor, reads
none of the CPU and runs no Python, and CUDA graphs can record it.
"""

import weakref
from typing import TYPE_CHECKING

from nmcompile.training.refresh_mask import ALWAYS, NEVER, UNTIL_FOLLOWED

if TYPE_CHECKING:
    from nmcompile.training.masks import WeightMask


class MaskGuard:
    """A guard of one mask; `compares` says when it compares the weight's fingerprint."""

    def __init__(self, mask: "WeightMask", compares: int) -> None:
        self._mask = weakref.ref(mask)
        self._compares = compares

    def look(self) -> list[object]:
        """Bring the mask up to date; there is nothing for which Dynamo should compile again."""
        mask = self._mask()
        if mask is not None:
            mask.bring_up_to_date(self._compares)
        return []


def _opaque() -> type[MaskGuard] | None:
    """Return the class of guards that Dynamo asks; None if it cannot, since this is not a public part of torch."""
    try:
        from torch._library.opaque_object import register_opaque_type
        from torch._opaque_base import OpaqueBase

        kind: type[MaskGuard] = type("OpaqueMaskGuard", (MaskGuard, OpaqueBase), {})
        register_opaque_type(kind, typ="reference", guard_fn=MaskGuard.look)
    except (ImportError, TypeError):
        return None
    return kind


_kind = _opaque()


def guards_of(mask: "WeightMask") -> tuple[MaskGuard, ...] | None:
    """Return a guard for each condition under which a call compares; None if Dynamo cannot ask them."""
    return None if _kind is None else tuple(_kind(mask, compares) for compares in (NEVER, UNTIL_FOLLOWED, ALWAYS))
