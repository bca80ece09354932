"""The clock of a mask: the state of its weight when last accepted, compared with the present weight."""

from array import array
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nmcompile.fingerprint import fingerprint
from nmcompile.weight_cache import Content

STALE, VERSION, ADDRESS, CONTENT, FOLLOWED = range(5)
"""Hands of a mask's clock: whether and why it is stale; version, address and fingerprint of the weight when last
accepted; whether an optimizer is known to step the weight.
"""
HOLDS, WRITTEN, STEPPED = range(3)
"""Values of the first hand: the mask holds; or it is stale, because the weight was written, or by optimizer steps."""
NEVER_SEEN = -1  # a version
UNKNOWN = 0  # a fingerprint


class WeightClock:
    """Version, address and fingerprint of a weight when it was last accepted: a write changes at least one of them.

    All methods take the weight as it is registered now, None if it is computed from others.
    """

    def __init__(self) -> None:
        self.accepted: int | None = None  # The id of the parameter whose version and address the hands hold.
        self._set_hands([WRITTEN, NEVER_SEEN, 0, UNKNOWN, 0])

    def _set_hands(self, values: Iterable[int]) -> None:
        # One memory, seen twice: a compiled step reads and resets the tensor without recompilation, and an eager one
        # reads the array, which takes a hundredth of the time.
        self._values = array("q", values)
        self.hands = torch.frombuffer(self._values, dtype=torch.int64)

    @property
    def is_stale(self) -> bool:
        """Return whether the mask has to be rebuilt."""
        return self._values[STALE] != HOLDS

    @property
    def staleness(self) -> int:
        """Return whether the mask holds, or why it is stale: `HOLDS`, `WRITTEN` or `STEPPED`."""
        return self._values[STALE]

    @staleness.setter
    def staleness(self, value: int) -> None:
        self._values[STALE] = value

    def expire(self) -> None:
        """Become stale by optimizer steps, unless a write has already made the mask stale."""
        if not self.is_stale:
            self._values[STALE] = STEPPED

    @property
    def is_followed(self) -> bool:
        """Return whether an optimizer is known to step the weight."""
        return bool(self._values[FOLLOWED])

    @is_followed.setter
    def is_followed(self, value: bool) -> None:
        self._values[FOLLOWED] = value

    @property
    def content(self) -> int:
        """Return the accepted fingerprint."""
        return self._values[CONTENT]

    @content.setter
    def content(self, value: int) -> None:
        self._values[CONTENT] = value

    def accept(self, weight: nn.Parameter | None, content: int = UNKNOWN) -> None:
        """Accept the present weight as known: a later write that no step explains will show.

        Without `content`, the next call that computes a fingerprint accepts that one.
        """
        # A sharded parameter is not the tensor that forward sees, so its version says nothing.
        if type(weight) is not nn.Parameter or weight.is_inference() or weight.is_meta:
            self.accepted = None
            self._values[VERSION], self._values[CONTENT] = NEVER_SEEN, content
        else:
            self.accepted = id(weight)
            self._values[VERSION:FOLLOWED] = array("q", (weight._version, weight.data_ptr(), content))

    def accept_content(self, weight: nn.Parameter | None) -> None:
        """Accept the present weight as known, down to the last bit."""
        self.accept(weight, UNKNOWN if weight is None else fingerprint(weight) or UNKNOWN)

    def notice(self, weight: nn.Parameter | None, content: int | None) -> bool:
        """Return whether the weight was written, and accept it, with this fingerprint if it is known."""
        known, was_moved = self.content, self.was_moved(weight)
        if was_moved or (content is not None and content != known):
            self.accept(None if self.accepted is None else weight, content or UNKNOWN)
        return was_moved if content is None or known == UNKNOWN else content != known

    def is_written(self, weight: nn.Parameter | None, content: int | None) -> bool:
        """Return whether the weight, with this fingerprint if it is known, differs from the accepted one."""
        known = self.content
        return self.was_moved(weight) if content is None or known == UNKNOWN else content != known

    def was_moved(self, weight: nn.Parameter | None) -> bool:
        """Return whether the weight has another version or address than when it was last accepted."""
        # A shard, or a tensor that FSDP2 gathers from shards, is not the tensor whose version was accepted.
        if weight is None or id(weight) != self.accepted:
            return False
        # `weight.data = ...` changes the address but not the version.
        return (weight._version, weight.data_ptr()) != (self._values[VERSION], self._values[ADDRESS])

    def still_holds(self, weight: Tensor, content: Content | None) -> bool:
        """Return whether this is the accepted parameter, as it was, and its mask is not stale: the usual case."""
        stale, version, address, known, _ = self._values
        if stale or id(weight) != self.accepted or content not in (None, known):
            return False
        return (version, address) == (weight._version, weight.data_ptr())

    def is_of(self, weight: Tensor) -> bool:
        """Return whether this is the accepted parameter, or a view such as `weight.detach()`; true if none is."""
        return self.accepted is None or id(weight) == self.accepted or weight.data_ptr() == self._values[ADDRESS]

    def has_content(self, weight: Tensor, content: Content | None) -> bool:
        """Return whether this tensor holds the accepted values, by its fingerprint unless `content` is given."""
        return (fingerprint(weight) if content is None else content) == self.content

    def start_anew(self) -> None:
        """Know the weight by its fingerprint only: a loaded clock comes from a process with other versions and ids."""
        self.accepted = None
        self._values[VERSION], self._values[FOLLOWED] = NEVER_SEEN, 0

    def __getstate__(self) -> dict[str, object]:
        return {"accepted": self.accepted, "hands": self._values.tolist()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.accepted = state["accepted"]
        self._set_hands(state["hands"])


def staleness_of(weight: Tensor, hands: Tensor, content: int | None) -> int:
    """Return what the clock of a mask says of it; `WRITTEN` also if the weight was written unseen."""
    staleness, version, address, known, _ = hands.tolist()
    if content is not None and known != UNKNOWN:
        is_written = content != known
    else:
        is_written = tells_writes(weight, hands) and (version, address) != (weight._version, weight.data_ptr())
    return WRITTEN if is_written else int(staleness)


def tells_writes(weight: Tensor, hands: Tensor) -> bool:
    """Return whether this tensor's version and address reveal writes: inductor may pass a copy, counting from 0."""
    if weight.is_inference() or int(hands[VERSION]) == NEVER_SEEN:
        return False
    return weight._version > 0 or int(hands[ADDRESS]) == weight.data_ptr()
