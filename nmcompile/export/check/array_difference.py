"""Difference of two arrays whose values need not be finite."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]


def difference(got: Array, want: Array) -> Doubles:
    """Return `got - want`; 0 where both are the same infinity, as in masks of logits, or both are NaN.

    Where only one of them is infinite or NaN, the difference is too, and so exceeds every limit.
    """
    x, y = got.astype(np.float64), want.astype(np.float64)
    is_same = (x == y) | (np.isnan(x) & np.isnan(y))
    return np.subtract(x, y, out=np.zeros_like(x), where=~is_same)


def finite(x: Array) -> Doubles:
    """Return the values with 0 in place of infinities and NaN."""
    return np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
