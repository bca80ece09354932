"""The library's own compression of a matrix, which takes as long as a large product."""

import ctypes

import torch
from torch import Tensor

from nmcompile.backends.cusparselt.library import Library
from nmcompile.backends.cusparselt.plans import PLAIN, describe_sparse

IS_SPARSE = 1  # the matrix is the sparse operand of a product


def compress(library: Library, matrix: Tensor) -> Tensor:
    """Return the bytes of a contiguous matrix that keeps at most two of every four elements of a row.

    The library tells their number. For some depths it is more than 9/16 of the matrix, since it pads the codes, and
    PyTorch's function would then write past the end of the memory that it reserves.
    """
    rows, depth = matrix.shape
    size, space = ctypes.c_size_t(), ctypes.c_size_t()
    with library.on(matrix.device):
        handle = library.handle(matrix.device)
        described = describe_sparse(library, rows, depth, matrix.dtype, matrix.device)
        library.call("cusparseLtSpMMACompressedSize2", handle, described, ctypes.byref(size), ctypes.byref(space))
        out, buffer = (torch.zeros(count.value, dtype=torch.uint8, device=matrix.device) for count in (size, space))
        addresses = (ctypes.c_void_p(x.data_ptr()) for x in (matrix, out, buffer))
        stream = ctypes.c_void_p(library.stream(matrix.device))
        library.call("cusparseLtSpMMACompress2", handle, described, IS_SPARSE, PLAIN, *addresses, stream)
        library.functions.cusparseLtMatDescriptorDestroy(described)
    return out
