"""Checks of gradients after a timed training step: whether they are finite, and how many are zero."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d


def zero_share(step: Callable[[], object], model: nn.Module) -> float:
    """Return the share of zeros among the gradients of all linear and conv outputs: MVUE costs less on zeros."""
    found: list[Tensor] = []

    def note(gradient: Tensor) -> None:
        found.append((gradient == 0).float().mean())

    def watch(module: nn.Module, args: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(note)  # sees the gradient of the output as it is before a ReLU works in place

    handles = [layer.register_forward_hook(watch) for layer in model.modules() if isinstance(layer, LAYERS)]
    step()
    for handle in handles:
        handle.remove()
    return float(torch.stack(found).mean())


def check_finite(models: Mapping[str, nn.Module]) -> None:
    """Stop if training has diverged: on a NaN every pruning kernel takes its slow path."""
    for variant, model in models.items():
        if not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
            raise SystemExit(f"{variant}: a gradient is not finite after the last timed step")
