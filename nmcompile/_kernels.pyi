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

def prune_bytes(x: int, pruned: int, blocks: int, wide: bool, isa: str) -> None:
    """Write the four largest of each eight bytes at address `x` to `pruned`, and zeros between them.

    Without `wide`, bytes are below 32. `pruned` may be `x`.
    """

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

class FrozenLinear:
    """A linear layer whose operands, its input excepted, do not change."""

    def __init__(
        self, packed: PackedIntegers, step: float, low: int, high: int, steps: Tensor, bias: Tensor | None
    ) -> None: ...
    def run(self, input: int, tokens: int, output: int, isa: str, threads: int) -> bool:
        """Round the float32 tokens at address `input` to the grid, and write the results to address `output`.

        Return False, and leave the output undefined, if one is a NaN.
        """

class Decoder:
    """A Llama on frozen linear layers, with a cache of keys and values; the caller keeps all operands alive."""

    position: int

    def __init__(
        self,
        sizes: list[int],
        epsilon: float,
        scale: float,
        embedding: Tensor,
        cosines: Tensor,
        sines: Tensor,
        gain: Tensor,
        logits: FrozenLinear,
    ) -> None:
        """Sizes are width, hidden width, heads, key heads, width of a head, and positions of the cache."""

    def add(self, layers: list[FrozenLinear], before_attention: Tensor, before_mlp: Tensor) -> None:
        """Add a block: query, key, value, output, gate, up and down."""

    def run(self, tokens: Tensor, logits: Tensor, isa: str, threads: int) -> bool:
        """Append int64 tokens and write the logits after the last; return False if a layer reads a NaN."""

    def rewind(self, position: int) -> None:
        """Forget all positions from this one on."""

Image = tuple[int, int, int, int, int, int, int, int]
"""Offset in the arena, samples, height, width, channels, halo, fill, and bytes from a pixel to the next."""

class IntegerLayer:
    """The integers of a convolution, packed."""

    form: str
    bytes: int

def integer_layer(
    weights: Tensor, groups: int, stride: tuple[int, int], dilation: tuple[int, int], most: int
) -> IntegerLayer:
    """Pack integers `(out, height, width, in / groups)` for codes up to `most`."""

INTEGER_LAYER_DEPTH: int
"""Depth from which on sums of products of bytes may need more than 32 bits."""

def convolve_integers(
    layer: IntegerLayer,
    x: Tensor | CapsuleType,
    step: float,
    low: int,
    high: int,
    exact: bool,
    prunes: bool,
    padding: tuple[int, int],
    steps: Tensor | CapsuleType,
    bias: Tensor | CapsuleType | None,
    y: Tensor | CapsuleType,
    isa: str,
    threads: int,
) -> bool:
    """Write a convolution of `x`, put on the grid of `step`, to `y`: float32 images, contiguous or channels last.

    With `prunes` the four largest codes of each eight channels stay, of equal ones the first. Sums of integers are
    multiplied by a step for each out-channel, then the bias is added. Return False, and leave `y` undefined, if a value
    is a NaN or, if `exact`, no whole step in `[low, high]`.
    """

class IntegerProgram:
    """A network in integers: steps on images in one arena."""

    def __init__(self, bytes: int) -> None: ...
    def encode(self, slot: int, output: Image, step: float, low: int, high: int) -> None:
        """Add: codes are clamp(round(x / step), low, high) - low."""

    def layer(
        self,
        layer: IntegerLayer,
        input: Image,
        output: Image,
        zero: int,
        padding: tuple[int, int],
        steps: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        shift: Tensor | None,
        out_step: float,
        low: int,
        high: int,
        table: Tensor | None,
        prune: bool,
    ) -> None:
        """Add: y = (sums * steps + bias) * gain + shift, in codes, mapped by a table and pruned 4:8."""

    def layer_to_floats(
        self,
        layer: IntegerLayer,
        input: Image,
        slot: int,
        zero: int,
        padding: tuple[int, int],
        steps: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        shift: Tensor | None,
    ) -> None:
        """Add: y in floats, channels first."""

    def recode(self, input: Image, output: Image, table: Tensor | None, prune: bool) -> None:
        """Add: codes mapped by a table and pruned."""

    def add(self, a: Image, b: Image, output: Image, offset: int, low: int, high: int) -> None:
        """Add: codes are clamp(a + b + offset, low, high)."""

    def max_pool(
        self,
        input: Image,
        output: Image,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> None:
        """Add: the largest code of each window, clipped at the borders."""

    def flatten(self, input: Image, output: Image, table: Tensor | None, prune: bool) -> None:
        """Add: codes in the order of channels, height and width, in one pixel."""

    def decode(self, input: Image, slot: int, values: Tensor) -> None:
        """Add: the values of codes, channels first."""

    def run(self, first: int, last: int, slots: list[int], isa: str, threads: int) -> int:
        """Run steps `[first, last)` on the floats at these addresses.

        Return the number of a step that read a NaN, or -1.
        """
