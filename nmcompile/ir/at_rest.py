"""Whether weights are at rest: a call does not train them, so values that are derived from them may be cached."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Literal

FROZEN: Final = "frozen"
"""The content of weights whose owner has said that they stand still, see `nmcompile.freeze`."""
Content = int | Literal["frozen"]

_content: ContextVar[Content | None] = ContextVar("_content", default=None)


@contextmanager
def weights_at_rest(content: Content = FROZEN) -> Iterator[None]:
    """Inside, the weight of the layer that runs is at rest, and has this content (its fingerprint)."""
    token = _content.set(content)
    try:
        yield
    finally:
        _content.reset(token)


def content_at_rest() -> Content | None:
    """The content of the weight of the layer that runs; None where it may change."""
    return _content.get()


def are_weights_at_rest() -> bool:
    return _content.get() is not None
