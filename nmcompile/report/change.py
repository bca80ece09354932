"""One thing that differs between two reports."""

from dataclasses import dataclass

NOISE = 0.1  # × a time, by which two measurements of the same kernel differ
Value = str | float | None


@dataclass(frozen=True)
class Change:
    """One thing that differs, before and after.

    Args:
        what: its name, `"plan"` for example.
        before, after: texts, seconds of a time or the share of an error; None is what a report does not hold.
        phase: the GEMM that it is about, `"forward"`; `""` if it is about the layer or the model.
    """

    what: str
    before: Value
    after: Value
    phase: str = ""

    @property
    def is_number(self) -> bool:
        """Return whether values are times or errors, which differ from layer to layer."""
        return not any(isinstance(value, str) for value in (self.before, self.after))
