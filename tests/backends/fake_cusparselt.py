"""cuSPARSELt in Python: the C functions that the backend calls, computed by PyTorch on CPU tensors.

As the library does, they know a structure by its address, read operands and bias at the addresses that they are given,
and some of their algorithms are wrong.
"""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nmcompile.backends.cusparselt.library import Library
from nmcompile.backends.cusparselt.plans import (
    ALGORITHM_COUNT,
    ALGORITHM_ID,
    ALIGNMENT,
    BIAS_POINTER,
    PLAIN,
    ROWS_FIRST,
    SPLIT_K,
    TYPES,
    Algorithm,
)
from nmcompile.backends.cusparselt.support import Sizes
from nmcompile.ir.protocols import Support
from nmcompile.pruning.packed import Packed, pack, two_of_four, unpack

OK, INVALID = 0, 1
ALGORITHMS, VALID = 6, 4
"""How many algorithms the library says there are, and how many of them it takes."""
RIGHT = Algorithm(3, 2)
WORKSPACE = 64
DTYPES = {number: dtype for dtype, number in TYPES.items()}
Compress = Callable[[Tensor], Tensor]
_numbers = count()


def compress_in_rows(matrix: Tensor) -> Tensor:
    """Return the bytes of the kept values by rows, followed by the codes of their groups by rows."""
    assert matrix.is_contiguous()
    values, indices = pack(matrix, two_of_four(matrix, 1), 1)
    return torch.cat([values.flatten().view(torch.uint8), indices.flatten()])


def pruned(*shape: int, dim: int = 1) -> Tensor:
    """Return random numbers that are 2:4 along a dim."""
    places = torch.arange(shape[dim]).view(*(-1 if d == dim else 1 for d in range(len(shape))))
    return torch.where(places % 4 < 2, torch.randn(*shape), 0.0)


def memory(address: int, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a view of memory."""
    assert address % ALIGNMENT == 0
    content = (ctypes.c_byte * (prod(size) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(content, dtype=dtype).view(size)


class Matrix(NamedTuple):
    """A matrix that a descriptor describes."""

    rows: int
    columns: int
    dtype: torch.dtype
    by_rows: bool

    def at(self, address: int) -> Tensor:
        """Return the matrix at an address."""
        if self.by_rows:
            return memory(address, (self.rows, self.columns), self.dtype)
        return memory(address, (self.columns, self.rows), self.dtype).t()

    def decompressed(self, address: int) -> Tensor:
        """Return the matrix from its compressed form at an address."""
        values = memory(address, (self.rows, self.columns // 2), self.dtype)
        return unpack(Packed(values, memory(address + values.nbytes, (self.rows, self.columns // 8), torch.uint8)), 1)


class Matmul:
    """A product that a descriptor describes."""

    def __init__(self, sparse: Matrix, dense: Matrix, result: Matrix, is_plain: bool) -> None:
        self.sparse, self.dense, self.result, self.is_plain = sparse, dense, result, is_plain
        self.bias = 0
        lanes = dense.columns if is_plain else dense.rows
        self.sizes = Sizes(sparse.rows, sparse.columns, lanes)
        assert (dense.rows if is_plain else dense.columns) == sparse.columns
        assert (result.rows, result.columns) == (sparse.rows, lanes)

    def compute(self, compressed: int, dense: int, factor: float, output: int) -> None:
        """Write the product, `factor` times too large, at the address of the output."""
        matrix = self.dense.at(dense).float()
        product = self.sparse.decompressed(compressed).float() @ (matrix if self.is_plain else matrix.t())
        if self.bias:
            product += memory(self.bias, (self.result.rows, 1), self.result.dtype).float()
        self.result.at(output).copy_(factor * product)


class Functions:
    """The C functions.

    Args:
        order: compresses, in an order of the codes that the library may have; products take `compress_in_rows` alone.

    Attributes:
        compressions: the matrices that were compressed.
        right: the one algorithm that is right; None if all are wrong.
        calls: the functions that were called, without their prefix.
        refused: functions that fail.
        sizes: of the products that were computed.
        structures: what each structure describes, by its address.
    """

    def __init__(self, order: Compress) -> None:
        self.order = order
        self.compressions: list[Tensor] = []
        self.right: Algorithm | None = RIGHT
        self.calls: list[str] = []
        self.refused: set[str] = set()
        self.sizes: list[Sizes] = []
        self.structures: dict[int, Any] = {}

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("cusparseLt"):
            return super().__getattribute__(name)
        self.calls.append(name.removeprefix("cusparseLt"))
        return (lambda *_: INVALID) if name in self.refused else super().__getattribute__(name)

    def cusparseLtGetErrorString(self, _: int) -> bytes:
        return b"no"

    def cusparseLtGetProperty(self, part: int, number: Any) -> int:
        number._obj.value = (0, 9, 1)[part]
        return OK

    def cusparseLtInit(self, handle: Any) -> int:
        return self._describe(handle, "handle")

    def cusparseLtStructuredDescriptorInit(self, _: Any, out: Any, rows: Any, columns: Any, *rest: Any) -> int:
        if rows.value % 16 or columns.value % 16:
            return INVALID
        return self._describe_matrix(out, rows, columns, *rest[:-1])

    def cusparseLtSpMMACompressedSize2(self, _: Any, matrix: Any, size: Any, space: Any) -> int:
        described = self._at(matrix)
        content = torch.zeros(described.rows, described.columns, dtype=described.dtype)
        size._obj.value, space._obj.value = self.order(content).nbytes, WORKSPACE
        return OK

    def cusparseLtSpMMACompress2(
        self, _: Any, matrix: Any, is_sparse: int, operation: int, address: Any, output: Any, *__: Any
    ) -> int:
        assert is_sparse and operation == PLAIN
        content = self._at(matrix).at(address.value).clone()
        self.compressions.append(content)
        result = self.order(content)
        memory(output.value, (len(result),), torch.uint8).copy_(result)
        return OK

    def cusparseLtDenseDescriptorInit(self, _: Any, out: Any, rows: Any, columns: Any, *rest: Any) -> int:
        return self._describe_matrix(out, rows, columns, *rest)

    def cusparseLtMatmulDescriptorInit(self, _: Any, out: Any, sparse_is: int, dense_is: int, *matrices: Any) -> int:
        sparse, dense, result, written = (self._at(matrix) for matrix in matrices[:4])
        assert sparse_is == PLAIN and result is written
        return self._describe(out, Matmul(sparse, dense, result, dense_is == PLAIN))

    def cusparseLtMatmulDescSetAttribute(self, _: Any, matmul: Any, attribute: int, value: Any, __: Any) -> int:
        assert attribute == BIAS_POINTER
        self._at(matmul).bias = value._obj.value
        return OK

    def cusparseLtMatmulAlgSelectionInit(self, _: Any, out: Any, matmul: Any, __: int) -> int:
        return self._describe(out, {ALGORITHM_ID: 0, SPLIT_K: 1})

    def cusparseLtMatmulAlgGetAttribute(self, _: Any, selection: Any, attribute: int, value: Any, __: Any) -> int:
        assert attribute == ALGORITHM_COUNT
        value._obj.value = ALGORITHMS
        return OK

    def cusparseLtMatmulAlgSetAttribute(self, _: Any, selection: Any, attribute: int, value: Any, __: Any) -> int:
        self._at(selection)[attribute] = value._obj.value
        return OK

    def cusparseLtMatmulPlanInit(self, _: Any, out: Any, matmul: Any, selection: Any) -> int:
        algorithm = Algorithm(self._at(selection)[ALGORITHM_ID], self._at(selection)[SPLIT_K])
        return self._describe(out, (self._at(matmul), algorithm)) if algorithm.id < VALID else INVALID

    def cusparseLtMatmulGetWorkspace(self, _: Any, plan: Any, size: Any) -> int:
        size._obj.value = WORKSPACE
        return OK

    def cusparseLtMatmul(
        self, handle: int, plan: int, one: int, compressed: int, dense: int, zero: int, c: int, d: int, *_: Any
    ) -> int:
        matmul, algorithm = self.structures[plan]
        scales = [ctypes.c_float.from_address(address).value for address in (one, zero)]
        assert self.structures[handle] == "handle" and scales == [1.0, 0.0] and c == d
        wrong = 1.5 if algorithm.id % 2 else torch.nan
        matmul.compute(compressed, dense, 1.0 if algorithm == self.right else wrong, d)
        self.sizes.append(matmul.sizes)
        return OK

    def cusparseLtMatmulPlanDestroy(self, plan: Any) -> int:
        return self._forget(plan)

    def cusparseLtMatmulAlgSelectionDestroy(self, selection: Any) -> int:
        return self._forget(selection)

    def cusparseLtMatDescriptorDestroy(self, matrix: Any) -> int:
        return self._forget(matrix)

    def _describe_matrix(
        self, out: Any, rows: Any, columns: Any, leading: Any, alignment: int, kind: int, order: int
    ) -> int:
        matrix = Matrix(rows.value, columns.value, DTYPES[kind], order == ROWS_FIRST)
        assert leading.value == (matrix.columns if matrix.by_rows else matrix.rows) and alignment == ALIGNMENT
        return self._describe(out, matrix)

    def _describe(self, structure: Any, content: Any) -> int:
        self.structures[ctypes.addressof(structure)] = content
        return OK

    def _at(self, structure: Any) -> Any:
        return self.structures[ctypes.addressof(structure)]

    def _forget(self, structure: Any) -> int:
        del self.structures[ctypes.addressof(structure)]
        return OK


class FakeLibrary(Library):
    """A library on CPU tensors. It takes float32 too, so that rounding hides nothing.

    Args:
        order: that of the C functions.

    Attributes:
        capturing: whether a CUDA graph is being captured.
        current_stream: the stream that takes the work.
    """

    device_type = "cpu"
    dtypes = (*Library.dtypes, torch.float32)
    functions: Functions

    def __init__(self, order: Compress = compress_in_rows) -> None:
        super().__init__(f"fake {next(_numbers)}")
        self.functions = Functions(order)
        self.capturing, self.current_stream = False, 0

    def support(self) -> Support:
        return Support(True, "computed by PyTorch")

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    def stream(self, device: torch.device) -> int:
        return self.current_stream

    def is_capturing(self, device: torch.device) -> bool:
        return self.capturing
