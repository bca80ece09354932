"""A bounded mapping that drops the key that was used least recently."""

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """The values of the `size` most recently used keys; threads may share it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key) -> Value | None:
        """Return the value of a key, which then counts as used; None if there is none."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: Key, value: Value) -> None:
        """Set the value of a key, and drop the key that was used least recently if there are too many."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            if len(self._values) > self.size:
                self._values.popitem(last=False)

    def drop(self, key: Key) -> None:
        """Drop a key, if it is there."""
        with self._lock:
            self._values.pop(key, None)

    def items(self) -> list[tuple[Key, Value]]:
        """Return the keys with their values, the least recently used first."""
        with self._lock:
            return list(self._values.items())

    def clear(self) -> None:
        """Drop all keys."""
        with self._lock:
            self._values.clear()
