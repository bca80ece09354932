"""The protocol between a layer and the mask of its weight."""

from typing import Protocol

from torch import Tensor

from nmcompile.ir.found_mask import FoundMask
from nmcompile.weight_cache import Content


class MaskSource(Protocol):
    """Source of the current mask of a weight."""

    tensor: Tensor
    steps: int
    found: FoundMask | None

    @property
    def is_stale(self) -> bool:
        """Return whether the next `current` rebuilds the mask."""

    @property
    def is_followed(self) -> bool:
        """Return whether an optimizer is known to step the weight: then calls that train it compare nothing."""

    def current(self, weight: Tensor, content: Content | None, is_trained: bool = False) -> Tensor:
        """Return the mask, bool of the weight's shape; rebuilt from `weight` if it is stale.

        `content` is the weight's fingerprint, `FROZEN` if nothing is to be compared, or None if it is not known.
        """

    def preview(self, weight: Tensor) -> Tensor:
        """Return the mask that `current` would return, without a change of state."""

    def mark_stale(self) -> None:
        """Make the next `current` rebuild the mask."""

    def note_load(self, steps: int) -> None:
        """Note that `load_state_dict` has written the weight, after `steps` steps of sparse training."""

    def look(self) -> None:
        """Become stale if the weight was written, before something else changes it."""

    def move(self, tensor: Tensor) -> None:
        """Replace the mask's tensor by one on another device, as the weight has moved too."""

    def note_assignment(self) -> None:
        """Become stale if another parameter has replaced the weight."""

    def note_backward(self) -> None:
        """Note a backward call that computed a gradient of the weight."""
