from torch import Tensor
from typing_extensions import CapsuleType

from nmcompile.backends.cpu.contraction import Axis

MAX_BLOCK: int
MAX_BATCH_DIMS: int
INSTRUCTION_SETS: tuple[str, ...]
INTEGERS_DEPTH: int

def memory(bytes: int) -> Tensor:
    """Allocate uninitialized uint8 memory, reusing freed memory if it fits."""

def fingerprint(address: int, bytes: int, threads: int) -> int:
    """Compute a number that changes with the bytes at that address, see `nmcompile.fingerprint`."""

def write_masked(x: int, mask: int, out: int, count: int, size: int, threads: int) -> None:
    """Write the elements at address `x`, of `size` bytes each, to `out`: zero where the mask does not hold."""

def prune(
    op: str,
    x: Tensor | CapsuleType,
    out: Tensor | CapsuleType,
    indices: Tensor | CapsuleType | None,
    dim: int,
    n_keep: int,
    block: int,
    relu: bool,
    key: int,
    isa: str,
    threads: int,
) -> None:
    """Write `x`, pruned by an operator, into `out`; packed into `out` and `indices` if they are given.

    A bool `out` gets the mask of the kept elements.
    """

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
    """Write results of the exact transposable 2:4 mask of `x` into those outputs that are not None."""

def gemm(
    sparse: Tensor,
    rows: int,
    sparse_row: int,
    sparse_depth: Axis,
    dense: Tensor,
    dense_depth: Axis,
    dense_lanes: Axis,
    height: int,
    width: int,
    output: Tensor,
    output_row: int,
    output_lanes: Axis,
    mask: Tensor | None,
    bias: Tensor | None,
    isa: str,
    threads: int,
) -> bool:
    """Write a contraction of tensors of one type, float32 or bfloat16, into `output`.

    Return False, and leave `output` undefined, if `sparse` is not 2:4 or one of the operands is not finite.
    """

def gemm_pruned(
    sparse: Tensor,
    rows: int,
    sparse_row: int,
    sparse_depth: Axis,
    dense: Tensor,
    dense_depth: Axis,
    dense_lanes: Axis,
    height: int,
    width: int,
    output: Tensor,
    output_row: int,
    output_lanes: Axis,
    op: str,
    n_keep: int,
    block: int,
    key: int,
    isa: str,
    threads: int,
) -> bool:
    """Write a contraction as `gemm` does, pruning `sparse` along its depth while packing it, its rows side by side.

    Return False, and leave `output` undefined, if one of the operands is not finite.
    """

class PackedSparse:
    """A float32 or bfloat16 operand that is 2:4 along its depth, without its zeros."""

    @property
    def bytes(self) -> int:
        """Return the size in memory."""

def pack_sparse(
    sparse: Tensor, rows: int, sparse_row: int, sparse_depth: Axis, mask: Tensor | None, isa: str, threads: int
) -> PackedSparse | None:
    """Pack the sparse operand of a contraction; return None if it is not 2:4 or not finite."""

def gemm_packed(
    packed: PackedSparse,
    dense: Tensor,
    dense_depth: Axis,
    dense_lanes: Axis,
    height: int,
    width: int,
    output: Tensor,
    output_row: int,
    output_lanes: Axis,
    bias: Tensor | None,
    isa: str,
    threads: int,
) -> bool:
    """Write a contraction of float32 or bfloat16 tensors of one type, one of which is packed, into `output`.

    Return False, and leave `output` undefined, if `dense` is not finite.
    """

class PackedIntegers:
    """A 2:4 matrix of 4-bit integers, in twelve bits per group of four."""

    @property
    def bytes(self) -> int:
        """Return the size in memory."""

def pack_integers(integers: Tensor, threads: int) -> PackedIntegers | None:
    """Pack int8 `(rows, depth)`; return None if some four keep more than two, or one has more than four bits."""

def code_integers(values: Tensor, step: float, low: int, high: int, codes: Tensor) -> bool:
    """Write values / step - low (tokens, depth) to wider codes; False if a value is no whole step in [low, high]."""

def multiply_integers(
    packed: PackedIntegers,
    input: Tensor,
    input_zero: int,
    steps: Tensor,
    bias: Tensor | None,
    output: Tensor,
    isa: str,
    threads: int,
) -> None:
    """Write K Qᵀ, times a step for each row of Q, plus the bias, into `output`.

    `input` is K + `input_zero`, uint8 of at most 15, filled up to a depth that `INTEGERS_DEPTH` divides; the others are
    float32. All are contiguous.
    """
