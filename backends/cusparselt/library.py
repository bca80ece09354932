"""The library through its C interface: a plan is made once per problem, and then costs some microseconds per product.

PyTorch's own operator makes a new plan in every call, for which the GPU waits longer than most products take.
"""

import ctypes
import threading
import weakref
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nmcompile.errors import LibraryError

SONAME = "libcusparseLt.so.0"  # PyTorch has loaded it
STRUCTURE = 4096  # bytes for one of the library's opaque structures; the largest known ones have 1024
ALIGNMENT = 16
PLANS = 512  # cached plans

# The enumerations of the library's header, and of CUDA's.
TYPES = {torch.float16: 2, torch.bfloat16: 14}
COLUMNS_FIRST, ROWS_FIRST = 1, 2
PLAIN, TRANSPOSED = 0, 1
COMPUTE_FLOAT32 = 2
BIAS_POINTER = 8
ALGORITHM_ID, ALGORITHM_COUNT, SPLIT_K = 0, 1, 3

_captured: set["Plan"] = set()
"""Plans that CUDA graphs use and that are never destroyed."""


class Problem(NamedTuple):
    """A product of a sparse `(rows, depth)` and a dense `(depth, lanes)` matrix.

    Args:
        rows, depth, lanes: sizes that need no padding.
        by_depth: the dense matrix is stored as `(depth, lanes)`, else as `(lanes, depth)`.
        by_rows: the result is stored as `(rows, lanes)`, else as `(lanes, rows)`.
        has_bias: `(rows,)` is added.
        dtype: of all of them; sums are float32.
        device: a CUDA device.
    """

    rows: int
    depth: int
    lanes: int
    by_depth: bool
    by_rows: bool
    has_bias: bool
    dtype: torch.dtype
    device: torch.device


class Algorithm(NamedTuple):
    """One of the library's kernels, and the number of parts that it splits the sum into (-1: its own choice)."""

    id: int
    split_k: int


def library_loads() -> bool:
    """Return whether the library can be called."""
    try:
        _library()
    except OSError:
        return False
    return True


def library_version() -> tuple[int, int, int]:
    """Return the version of the loaded library, which need not be the one that PyTorch was built with."""
    numbers = [ctypes.c_int() for _ in range(3)]
    for part, number in enumerate(numbers):
        _call("cusparseLtGetProperty", part, ctypes.byref(number))
    major, minor, patch = (number.value for number in numbers)
    return major, minor, patch


def stream_of(device: torch.device) -> int:
    """Return the stream that work on the device is put into."""
    return torch.cuda.current_stream(device).cuda_stream


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is captured there."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def algorithm_count(problem: Problem) -> int:
    """Return the number of algorithms that the library has for a problem."""
    with torch.cuda.device(problem.device):
        count, product = ctypes.c_int32(), _Product(problem)
        _call("cusparseLtMatmulAlgGetAttribute", product.handle, product.selection, ALGORITHM_COUNT, *_of(count))
    return count.value


def kept_plan(problem: Problem, algorithm: Algorithm, stream: int) -> "Plan | None":
    """Return the plan for a problem on a stream: a plan holds the bias, and two streams may run at the same time.

    No plan is made while a CUDA graph is captured. The graph then takes the plan of another stream, beside which it
    must not run if there is a bias; None if there is no such plan.
    """
    plans = _plans(problem, algorithm)
    if is_capturing(problem.device):
        plan = plans.get(stream) or next(iter(plans.values()), None)
        if plan is not None:
            _captured.add(plan)
        return plan
    if stream not in plans:
        plans[stream] = Plan(problem, algorithm)
    return plans[stream]


@lru_cache(PLANS)
def _plans(problem: Problem, algorithm: Algorithm) -> dict[int, "Plan"]:
    return {}


class _Product:
    """The library's description of a problem."""

    def __init__(self, problem: Problem) -> None:
        self.handle = handle = _handle(problem.device)
        rows, depth, lanes = problem.rows, problem.depth, problem.lanes
        self.matrices = [ctypes.create_string_buffer(STRUCTURE) for _ in range(3)]
        sparse, dense, result = self.matrices
        kind = ALIGNMENT, TYPES[problem.dtype]
        _call("cusparseLtStructuredDescriptorInit", handle, sparse, *_long(rows, depth, depth), *kind, ROWS_FIRST, 0)
        sizes = (depth, lanes, lanes) if problem.by_depth else (lanes, depth, depth)
        _call("cusparseLtDenseDescriptorInit", handle, dense, *_long(*sizes), *kind, ROWS_FIRST)
        order, leading = (ROWS_FIRST, lanes) if problem.by_rows else (COLUMNS_FIRST, rows)
        _call("cusparseLtDenseDescriptorInit", handle, result, *_long(rows, lanes, leading), *kind, order)
        self.matmul = ctypes.create_string_buffer(STRUCTURE)
        dense_is = PLAIN if problem.by_depth else TRANSPOSED
        operands = PLAIN, dense_is, sparse, dense, result, result
        _call("cusparseLtMatmulDescriptorInit", handle, self.matmul, *operands, COMPUTE_FLOAT32)
        # The address of the bias is part of a plan: each plan has a tensor for it.
        with torch.inference_mode(False):  # copies into it have to be allowed outside, too
            self.bias = torch.zeros(rows, dtype=problem.dtype, device=problem.device) if problem.has_bias else None
        if self.bias is not None:
            address = ctypes.c_void_p(self.bias.data_ptr())
            _call("cusparseLtMatmulDescSetAttribute", handle, self.matmul, BIAS_POINTER, *_of(address))
        self.selection = ctypes.create_string_buffer(STRUCTURE)
        _call("cusparseLtMatmulAlgSelectionInit", handle, self.selection, self.matmul, 0)
        weakref.finalize(self, _destroy_product, self.selection, self.matrices).atexit = False


class Plan:
    """A problem with an algorithm that solves it.

    Raises:
        LibraryError: the algorithm does not fit the problem.
    """

    def __init__(self, problem: Problem, algorithm: Algorithm) -> None:
        self.size = (problem.rows, problem.lanes) if problem.by_rows else (problem.lanes, problem.rows)
        with torch.cuda.device(problem.device):
            product = _Product(problem)
            handle, self.plan = product.handle, ctypes.create_string_buffer(STRUCTURE)
            # One part is the default, and not all algorithms allow setting it.
            chosen = {ALGORITHM_ID: algorithm.id} | ({SPLIT_K: algorithm.split_k} if algorithm.split_k != 1 else {})
            for name, value in chosen.items():
                _call("cusparseLtMatmulAlgSetAttribute", handle, product.selection, name, *_of(ctypes.c_int32(value)))
            _call("cusparseLtMatmulPlanInit", handle, self.plan, product.matmul, product.selection)
        weakref.finalize(self, _destroy_plan, self.plan).atexit = False
        size = ctypes.c_size_t()
        _call("cusparseLtMatmulGetWorkspace", handle, self.plan, ctypes.byref(size))
        self.workspace, self.bias, self.product = size.value, product.bias, product
        self.lock = threading.Lock()
        self.one, self.zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self.addresses = [ctypes.addressof(structure) for structure in (handle, self.plan, self.one, self.zero)]

    def run(self, compressed: Tensor, dense: Tensor, bias: Tensor | None, stream: int) -> Tensor:
        """Return the product of contiguous operands."""
        result = dense.new_empty(self.size)
        workspace = dense.new_empty(self.workspace, dtype=torch.uint8) if self.workspace else None
        handle, plan, one, zero = self.addresses
        output = result.data_ptr()
        operands = one, compressed.data_ptr(), dense.data_ptr(), zero, output, output
        space, streams = None if workspace is None else workspace.data_ptr(), ctypes.byref(ctypes.c_void_p(stream))
        with self.lock:  # threads may share a stream; another's bias must not come between
            if bias is not None and self.bias is not None:
                self.bias.copy_(bias)
            status = _library().cusparseLtMatmul(handle, plan, *operands, space, streams, 1)
        if status:
            raise LibraryError(_complaint("cusparseLtMatmul", status))
        return result


def _destroy_plan(plan: Any) -> None:
    _library().cusparseLtMatmulPlanDestroy(plan)


def _destroy_product(selection: Any, matrices: Sequence[Any]) -> None:
    _library().cusparseLtMatmulAlgSelectionDestroy(selection)
    for matrix in matrices:
        _library().cusparseLtMatDescriptorDestroy(matrix)


@cache
def _library() -> Any:
    library = ctypes.CDLL(SONAME)
    library.cusparseLtMatmul.argtypes = [ctypes.c_void_p] * 10 + [ctypes.c_int32]
    library.cusparseLtGetErrorString.restype = ctypes.c_char_p
    return library


@cache
def _handle(device: torch.device) -> Any:
    handle = ctypes.create_string_buffer(STRUCTURE)
    _call("cusparseLtInit", handle)
    return handle


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise LibraryError(_complaint(name, status))


def _complaint(name: str, status: int) -> str:
    text = (_library().cusparseLtGetErrorString(status) or b"").decode()
    return f"{name} of {SONAME} failed with {status} ({text})"


def _long(*values: int) -> Sequence[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def _of(value: Any) -> tuple[Any, ctypes.c_size_t]:
    """Return an attribute's value as the arguments that the library takes."""
    return ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))
