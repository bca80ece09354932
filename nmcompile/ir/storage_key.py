"""The storage of tensors, which views share."""

from torch import Tensor


def storage_key(tensor: Tensor) -> int:
    """Return a key that identifies a tensor's storage; views of one tensor have the same key."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):
        return id(tensor)
