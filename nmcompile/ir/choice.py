"""Which kernel runs a GEMM on its pruned operands, and what that was decided on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One decision for one GEMM at one size.

    Args:
        kernel: `"sparse"` or `"dense"`; both compute the same product of the same pruned operands.
        reason: what decided.
        predicted: the speed-up of the sparse kernel that the cost model expects, dense time / sparse time, if there
            is such a model.
        dense_seconds, sparse_seconds: of one call each, None where nothing was measured.
    """

    kernel: str
    reason: str
    predicted: float | None = None
    dense_seconds: float | None = None
    sparse_seconds: float | None = None

    @property
    def seconds(self) -> float | None:
        """Of the chosen kernel."""
        return self.sparse_seconds if self.kernel == "sparse" else self.dense_seconds

    @property
    def speedup(self) -> float | None:
        """Dense time / sparse time as measured."""
        if self.dense_seconds is None or not self.sparse_seconds:
            return None
        return self.dense_seconds / self.sparse_seconds

    def __str__(self) -> str:
        if self.speedup is None or self.dense_seconds is None or self.sparse_seconds is None:
            return f"{self.kernel}: {self.reason}"
        times = f"{self.dense_seconds * 1e3:.2f} / {self.sparse_seconds * 1e3:.2f} ms = {self.speedup:.2f}"
        return f"{self.kernel}: {times}" + (f", predicted {self.predicted:.2f}" if self.predicted else "")
