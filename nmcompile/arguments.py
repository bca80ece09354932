"""The types of a call's arguments, whatever the function is."""

from collections.abc import Mapping

Args = tuple[object, ...]
"""Positional arguments, such as the example inputs of a model."""
Kwargs = Mapping[str, object]
"""Arguments by name."""
