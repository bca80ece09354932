"""Plans of products. A plan is made once for a problem; a product with it then costs some microseconds."""

import ctypes
import threading
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nmcompile.backends.cusparselt.library import STRUCTURE, Library, Structure

ALIGNMENT = 16
PLANS = 512  # cached plans

# The enumerations of the library's header, and of CUDA's.
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
COLUMNS_FIRST, ROWS_FIRST = 1, 2
PLAIN, TRANSPOSED = 0, 1
COMPUTE_FLOAT32 = 2
HALF = 0  # of the elements are zeros: the only sparsity that there is
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


def algorithm_count(library: Library, problem: Problem) -> int:
    """Return the number of algorithms that the library has for a problem."""
    with library.on(problem.device):
        count, product = ctypes.c_int32(), _Product(library, problem)
        attribute = ALGORITHM_COUNT, *_of(count)
        library.call("cusparseLtMatmulAlgGetAttribute", product.handle, product.selection, *attribute)
    return count.value


def kept_plan(library: Library, problem: Problem, algorithm: Algorithm) -> "Plan | None":
    """Return the plan for a problem on the current stream: a plan holds the bias, so two streams cannot share it.

    No plan is made while a CUDA graph is captured. The graph then takes the plan of another stream, beside which it
    must not run if there is a bias; None if there is no such plan.
    """
    plans, stream = _plans(library, problem, algorithm), library.stream(problem.device)
    if library.is_capturing(problem.device):
        plan = plans.get(stream) or next(iter(plans.values()), None)
        if plan is not None:
            _captured.add(plan)
        return plan
    if stream not in plans:
        plans[stream] = Plan(library, problem, algorithm)
    return plans[stream]


@lru_cache(PLANS)
def _plans(library: Library, problem: Problem, algorithm: Algorithm) -> dict[int, "Plan"]:
    return {}


def describe_sparse(library: Library, rows: int, depth: int, dtype: torch.dtype, device: torch.device) -> Structure:
    """Return the library's description of a sparse matrix; the caller destroys it."""
    described = ctypes.create_string_buffer(STRUCTURE)
    sizes, kind = _long(rows, depth, depth), (ALIGNMENT, TYPES[dtype])
    library.call(
        "cusparseLtStructuredDescriptorInit", library.handle(device), described, *sizes, *kind, ROWS_FIRST, HALF
    )
    return described


class _Product:
    """The library's description of a problem."""

    def __init__(self, library: Library, problem: Problem) -> None:
        self.handle = handle = library.handle(problem.device)
        rows, depth, lanes = problem.rows, problem.depth, problem.lanes
        sparse = describe_sparse(library, rows, depth, problem.dtype, problem.device)
        dense, result = (ctypes.create_string_buffer(STRUCTURE) for _ in range(2))
        self.matrices = [sparse, dense, result]
        kind = ALIGNMENT, TYPES[problem.dtype]
        sizes = _long(depth, lanes, lanes) if problem.by_depth else _long(lanes, depth, depth)
        library.call("cusparseLtDenseDescriptorInit", handle, dense, *sizes, *kind, ROWS_FIRST)
        order, leading = (ROWS_FIRST, lanes) if problem.by_rows else (COLUMNS_FIRST, rows)
        library.call("cusparseLtDenseDescriptorInit", handle, result, *_long(rows, lanes, leading), *kind, order)
        self.matmul = ctypes.create_string_buffer(STRUCTURE)
        dense_is = PLAIN if problem.by_depth else TRANSPOSED
        operands = PLAIN, dense_is, sparse, dense, result, result
        library.call("cusparseLtMatmulDescriptorInit", handle, self.matmul, *operands, COMPUTE_FLOAT32)
        # The address of the bias is part of a plan: each plan has a tensor for it.
        with torch.inference_mode(False):  # copies into it have to be allowed outside, too
            self.bias = torch.zeros(rows, dtype=problem.dtype, device=problem.device) if problem.has_bias else None
        if self.bias is not None:
            address = ctypes.c_void_p(self.bias.data_ptr())
            library.call("cusparseLtMatmulDescSetAttribute", handle, self.matmul, BIAS_POINTER, *_of(address))
        self.selection = ctypes.create_string_buffer(STRUCTURE)
        library.call("cusparseLtMatmulAlgSelectionInit", handle, self.selection, self.matmul, 0)
        weakref.finalize(self, _destroy_product, library, self.selection, self.matrices).atexit = False


class Plan:
    """A problem with an algorithm that solves it.

    Raises:
        LibraryError: the algorithm does not fit the problem.
    """

    def __init__(self, library: Library, problem: Problem, algorithm: Algorithm) -> None:
        self.library = library
        self.size = (problem.rows, problem.lanes) if problem.by_rows else (problem.lanes, problem.rows)
        with library.on(problem.device):
            product = _Product(library, problem)
            handle, self.plan = product.handle, ctypes.create_string_buffer(STRUCTURE)
            # One part is the default, and not all algorithms allow setting it.
            chosen = {ALGORITHM_ID: algorithm.id} | ({SPLIT_K: algorithm.split_k} if algorithm.split_k != 1 else {})
            for name, value in chosen.items():
                attribute = name, *_of(ctypes.c_int32(value))
                library.call("cusparseLtMatmulAlgSetAttribute", handle, product.selection, *attribute)
            library.call("cusparseLtMatmulPlanInit", handle, self.plan, product.matmul, product.selection)
        weakref.finalize(self, _destroy_plan, library, self.plan).atexit = False
        size = ctypes.c_size_t()
        library.call("cusparseLtMatmulGetWorkspace", handle, self.plan, ctypes.byref(size))
        self.workspace, self.bias, self.product = size.value, product.bias, product
        self.lock = threading.Lock()
        self.one, self.zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self.addresses = [ctypes.addressof(structure) for structure in (handle, self.plan, self.one, self.zero)]

    def run(self, compressed: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product of contiguous operands, computed on the current stream."""
        result = dense.new_empty(self.size)
        workspace = dense.new_empty(self.workspace, dtype=torch.uint8) if self.workspace else None
        handle, plan, one, zero = self.addresses
        output = result.data_ptr()
        operands = one, compressed.data_ptr(), dense.data_ptr(), zero, output, output
        space = None if workspace is None else workspace.data_ptr()
        stream = ctypes.byref(ctypes.c_void_p(self.library.stream(dense.device)))
        with self.lock:  # threads may share a stream; another's bias must not come between
            if bias is not None and self.bias is not None:
                self.bias.copy_(bias)
            self.library.call("cusparseLtMatmul", handle, plan, *operands, space, stream, 1)
        return result


def _destroy_plan(library: Library, plan: Structure) -> None:
    library.functions.cusparseLtMatmulPlanDestroy(plan)


def _destroy_product(library: Library, selection: Structure, matrices: Sequence[Structure]) -> None:
    library.functions.cusparseLtMatmulAlgSelectionDestroy(selection)
    for matrix in matrices:
        library.functions.cusparseLtMatDescriptorDestroy(matrix)


def _long(*values: int) -> Sequence[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def _of(value: ctypes.c_int32 | ctypes.c_void_p) -> tuple[object, ctypes.c_size_t]:
    """Return an attribute's value as the arguments that the library takes."""
    return ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))
