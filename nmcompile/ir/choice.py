"""The choice of the kernel that runs a GEMM on its pruned operands, and the evidence for it."""

from dataclasses import dataclass

MEASURED = "measured"
"""Reason of a choice that its two times explain."""
TOO_FEW = "small"
"""Beginning of the reason why a product of few multiplications runs dense."""


@dataclass(frozen=True)
class Choice:
    """One decision for one GEMM at one size.

    Args:
        kernel: `"sparse"`, `"integers"` (sparse, and packed to four bits) or `"dense"`; all compute the same product of
            the same pruned operands.
        reason: why it was chosen.
        predicted: the speed-up of the sparse kernel that the cost model expects, dense time / sparse time, if there
            is such a model.
        dense_seconds, sparse_seconds, integers_seconds: of one call each, None if not measured. Beside integers,
            `dense_seconds` is the time of the fastest other kernel.
    """

    kernel: str
    reason: str
    predicted: float | None = None
    dense_seconds: float | None = None
    sparse_seconds: float | None = None
    integers_seconds: float | None = None

    @property
    def seconds(self) -> float | None:
        """Return the time of the chosen kernel."""
        return self.dense_seconds if self.kernel == "dense" else self._pruned_seconds

    @property
    def _pruned_seconds(self) -> float | None:
        return self.integers_seconds if self.kernel == "integers" else self.sparse_seconds

    @property
    def speedup(self) -> float | None:
        """Return the measured dense time / sparse time."""
        if self.dense_seconds is None or not self._pruned_seconds:
            return None
        return self.dense_seconds / self._pruned_seconds

    @property
    def why_dense(self) -> str:
        """Return why the dense kernel runs, in words that hold for layers of any size; empty if a sparse one does."""
        if self.kernel != "dense":
            return ""
        if self.reason.startswith(TOO_FEW):
            return "too few multiplications for a sparse kernel to gain; a larger batch has more"
        return "the sparse one was measured and gains nothing" if self.reason == MEASURED else self.reason

    def __str__(self) -> str:
        text = f"{self.kernel}: {self.reason}"
        if self.speedup is not None and self.dense_seconds is not None and self._pruned_seconds is not None:
            times = f"{self.dense_seconds * 1e3:.2f} / {self._pruned_seconds * 1e3:.2f} ms = {self.speedup:.2f}"
            text = f"{self.kernel}: {times}" + (f", predicted {self.predicted:.2f}" if self.predicted else "")
            text += "" if self.reason == MEASURED else f"; {self.reason}"
        if self.kernel != "integers" and self.integers_seconds is not None:
            text += f"; packed integers {self.integers_seconds * 1e3:.2f} ms"
        return text
