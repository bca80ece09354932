"""Whether weights are at rest: a layer runs without gradients, so that what is derived from its weight may be kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_at_rest: ContextVar[bool] = ContextVar("_at_rest", default=False)


@contextmanager
def weights_at_rest() -> Iterator[None]:
    """Inside, weights are at rest."""
    token = _at_rest.set(True)
    try:
        yield
    finally:
        _at_rest.reset(token)


def are_weights_at_rest() -> bool:
    return _at_rest.get()
