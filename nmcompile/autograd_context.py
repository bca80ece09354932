"""The context of a `torch.autograd.Function`, for which torch has no complete type."""

from typing import Protocol

from torch import Tensor


class AutogradContext(Protocol):
    """Context in which `forward` and `setup_context` keep tensors for the derivatives."""

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        """Return whether each argument of `apply` needs a gradient."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of `save_for_backward`, with None in place of each None."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for `backward`."""

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for `jvp`."""

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        """Tell autograd that these outputs have no gradient."""
