from torch import Tensor

MAX_BLOCK: int
MAX_BATCH_DIMS: int
INSTRUCTION_SETS: tuple[str, ...]

def mvue(x: Tensor, out: Tensor, dim: int, n_keep: int, block: int, key: int, threads: int) -> None:
    """Write the MVUE of `x` into `out`, a tensor of its shape and dtype."""

def transposable(
    x: Tensor,
    rows: int,
    columns: int,
    mask: Tensor | None,
    pruned: Tensor | None,
    forward_values: Tensor | None,
    forward_indices: Tensor | None,
    backward_values: Tensor | None,
    backward_indices: Tensor | None,
    isa: str,
    threads: int,
) -> None:
    """Write what follows from the exact transposable 2:4 mask of `x` into the outputs that are not None."""
