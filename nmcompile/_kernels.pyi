from torch import Tensor

MAX_BLOCK: int

def mvue(x: Tensor, out: Tensor, dim: int, n_keep: int, block: int, key: int, threads: int) -> None:
    """Write the MVUE of `x` into `out`, a tensor of its shape and dtype."""
