"""Choice of the backends that a model's nodes are offered to, and of their order."""

from torch import nn

from nmcompile.backends.cpu import CpuBackend
from nmcompile.backends.cusparselt import CusparseltBackend
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.backends.triton import TritonBackend
from nmcompile.checks import check_choice
from nmcompile.errors import BackendUnavailable
from nmcompile.ir.protocols import Backend

ACCELERATED: tuple[Backend, ...] = (TritonBackend(), CusparseltBackend(), CpuBackend())
"""Backends that `backend="auto"` asks before the reference backend if they are available, in this order.

For a model on the CPU the order is reversed.
"""


def choose_backends(backend: str | Backend, model: nn.Module) -> tuple[Backend, ...]:
    """Return the backends in the order in which they are asked; the reference backend takes the remaining nodes."""
    reference = ReferenceBackend()
    known = {one.name: one for one in ACCELERATED}
    if isinstance(backend, Backend) and not isinstance(backend, type):
        chosen = backend
    else:
        check_choice("backend", backend, ("auto", reference.name, *known))
        if backend == "auto":
            is_on_gpu = any(parameter.is_cuda for parameter in model.parameters())
            asked = ACCELERATED if is_on_gpu else ACCELERATED[::-1]
            return *(one for one in asked if one.available().ok), reference
        if backend == reference.name:
            return (reference,)
        chosen = known[str(backend)]
    support = chosen.available()
    if not support.ok:
        raise BackendUnavailable(f"backend {chosen.name!r} cannot run here: {support.reason}; or use backend='auto'")
    return chosen, reference
