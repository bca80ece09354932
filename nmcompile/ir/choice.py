"""Which kernel runs a GEMM on its pruned operands, and what that was decided on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One decision for one GEMM at one size.

    Args:
        kernel: `"sparse"` or `"dense"`; both compute the same product of the same pruned operands.
        reason: what decided.
        predicted: the speed-up of the sparse kernel that the cost model expects, dense time / sparse time.
        dense_seconds, sparse_seconds: of one call each, None where nothing was measured.
    """

    kernel: str
    reason: str
    predicted: float | None = None
    dense_seconds: float | None = None
    sparse_seconds: float | None = None

    @property
    def speedup(self) -> float | None:
        """Dense time / sparse time as measured."""
        if self.dense_seconds is None or not self.sparse_seconds:
            return None
        return self.dense_seconds / self.sparse_seconds
