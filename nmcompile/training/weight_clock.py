"""The clock of a mask: the state of its weight that was last accepted, held against the weight as it is now."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nmcompile.fingerprint import fingerprint
from nmcompile.weight_cache import Content

STALE, VERSION, ADDRESS, CONTENT, FOLLOWED = range(5)
"""The hands of a mask's clock: whether it is stale; version, address and fingerprint of the weight that was last
accepted; whether an optimizer is known to step the weight.
"""
NEVER_SEEN = -1  # a version
UNKNOWN = 0  # a fingerprint


class WeightClock:
    """Version, address and fingerprint of a weight when it was last accepted: a write changes at least one of them.

    All methods take the weight as it is registered now, None where it is computed from others.
    """

    def __init__(self) -> None:
        self.accepted: int | None = None  # The id of the parameter whose version and address the hands have.
        # On the CPU, and a tensor: a compiled step reads and resets it without being compiled again.
        self.hands = torch.tensor([1, NEVER_SEEN, 0, UNKNOWN, 0], device="cpu")

    def read(self) -> list[int]:
        """Return all hands at once, which takes less time than to index the tensor for one."""
        hands: list[int] = self.hands.tolist()
        return hands

    @property
    def is_stale(self) -> bool:
        """Whether the mask has to be rebuilt."""
        return bool(self.read()[STALE])

    @is_stale.setter
    def is_stale(self, value: bool) -> None:
        self.hands[STALE] = value

    @property
    def is_followed(self) -> bool:
        """Whether an optimizer is known to step the weight."""
        return bool(self.read()[FOLLOWED])

    @is_followed.setter
    def is_followed(self, value: bool) -> None:
        self._put({FOLLOWED: int(value)})

    @property
    def content(self) -> int:
        """The accepted fingerprint."""
        return self.read()[CONTENT]

    @content.setter
    def content(self, value: int) -> None:
        self.hands[CONTENT] = value

    def accept(self, weight: nn.Parameter | None, content: int = UNKNOWN) -> None:
        """Take the weight as it is now for known: a later write that no step explains shows.

        Without its fingerprint, the next call that compares one takes that for known.
        """
        # A sharded parameter is not the tensor that forward sees, so its version says nothing.
        if type(weight) is not nn.Parameter or weight.is_inference() or weight.is_meta:
            self.accepted = None
            self._put({VERSION: NEVER_SEEN, CONTENT: content})
        else:
            self.accepted = id(weight)
            self._put({VERSION: weight._version, ADDRESS: weight.data_ptr(), CONTENT: content})

    def accept_content(self, weight: nn.Parameter | None) -> None:
        """Take the weight as it is now for known, down to the last bit."""
        self.accept(weight, UNKNOWN if weight is None else fingerprint(weight) or UNKNOWN)

    def notice(self, weight: nn.Parameter | None, content: int | None) -> bool:
        """Tell whether the weight was written, and accept it as it is now, with this fingerprint if it is known."""
        is_written, known = self.is_written(weight, content), self.content
        if is_written or (content is not None and (content != known or self.was_moved(weight))):
            self.accept(None if self.accepted is None else weight, content or UNKNOWN)
        return is_written

    def is_written(self, weight: nn.Parameter | None, content: int | None) -> bool:
        """Whether the weight, with this fingerprint if it is known, differs from what was last accepted."""
        known = self.content
        return self.was_moved(weight) if content is None or known == UNKNOWN else content != known

    def was_moved(self, weight: nn.Parameter | None) -> bool:
        """Whether the weight has another version or address than was last accepted."""
        # A shard, or what FSDP2 gathers from shards, is not the tensor whose version was accepted.
        if weight is None or id(weight) != self.accepted:
            return False
        # `weight.data = ...` changes the address and no version.
        return [weight._version, weight.data_ptr()] != self.read()[VERSION:CONTENT]

    def is_of(self, weight: Tensor) -> bool:
        """Whether this is the parameter that was accepted, or a view such as `weight.detach()`; yes where none was."""
        return self.accepted is None or id(weight) == self.accepted or weight.data_ptr() == self.read()[ADDRESS]

    def has_content(self, weight: Tensor, content: Content | None) -> bool:
        """Whether this tensor holds the accepted values, by its fingerprint if `content` does not say."""
        return (fingerprint(weight) if content is None else content) == self.content

    def start_anew(self) -> None:
        """Know the weight by its fingerprint alone: what is loaded in another process has other versions and ids."""
        self.accepted = None
        self.hands[VERSION], self.hands[FOLLOWED] = NEVER_SEEN, 0

    def _put(self, values: Mapping[int, int]) -> None:
        """Set hands; most of them are there already, and to look takes less time."""
        now = self.read()
        for hand, value in values.items():
            if now[hand] != value:
                self.hands[hand] = value


def is_outdated(weight: Tensor, hands: Tensor, content: int | None) -> bool:
    """Whether the clock of a mask says that it is stale, or that the weight was written unseen."""
    stale, version, address, known, _ = hands.tolist()
    if content is not None and known != UNKNOWN:
        return bool(stale) or content != known
    return bool(stale) or (tells_writes(weight, hands) and (version, address) != (weight._version, weight.data_ptr()))


def tells_writes(weight: Tensor, hands: Tensor) -> bool:
    """Whether version and address of this tensor tell of writes: inductor may hand a copy over, which counts from 0."""
    if weight.is_inference() or int(hands[VERSION]) == NEVER_SEEN:
        return False
    return weight._version > 0 or int(hands[ADDRESS]) == weight.data_ptr()
