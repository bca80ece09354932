"""The origin of a mask that was found from calibration data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FoundMask:
    """Origin of a mask that was found from calibration data.

    Args:
        method: `"magnitude"` (with refitted weights), `"wanda"`, `"sparsegpt"` or `"admm"`.
        error: the relative error left in the layer's outputs over the data, ‖X (W - W')ᵀ‖ / ‖X Wᵀ‖.
    """

    method: str
    error: float

    def __str__(self) -> str:
        return f"mask by {self.method}, output error {self.error:.2%}"
