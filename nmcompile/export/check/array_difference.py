"""How far two arrays are apart where values need not be finite."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = np.ndarray[Any, Any]
Doubles = npt.NDArray[np.float64]


def difference(got: Array, want: Array) -> Doubles:
    """`got - want`; 0 where both are the same infinity, as masks of logits are, or both are NaN.

    What only one of them has is infinite or NaN here, and passes no limit.
    """
    x, y = got.astype(np.float64), want.astype(np.float64)
    is_same = (x == y) | (np.isnan(x) & np.isnan(y))
    return np.subtract(x, y, out=np.zeros_like(x), where=~is_same)


def finite(x: Array) -> Doubles:
    """The values with 0 in place of infinities and NaN."""
    return np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
