"""Weights that are compressed for the backward GEMM in the pass that compresses them for the forward GEMM.

Alone, either pass reads the weight and its mask. Together they read them once, and the second form waits for the
backward GEMM of the same step. A forward GEMM writes it only if the backward GEMM of the last step asked for one:
evaluation asks for none, nor does a backward GEMM that runs dense.
"""

from functools import cache
from typing import NamedTuple
from weakref import ref

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nmcompile.backends.cusparselt.library import Library
from nmcompile.backends.cusparselt.operand import Operand, compressed, packed_form

DEFAULT_STREAM = 0
Size = tuple[int, int]


class Waiting(NamedTuple):
    """A compressed weight, and what it was compressed from.

    Args:
        form: the bytes.
        size: rows and depth.
        weight: the weight.
        versions: of the weight and of its mask.
    """

    form: Tensor
    size: Size
    weight: "ref[Tensor]"
    versions: tuple[int, int]


class BothDirections:
    """The sizes that backward GEMMs asked for in the last step, and the forms that wait for those of this one.

    Both are found by the mask, which the two GEMMs of a layer share. A form is taken at most once, and only for the
    weight that the forward GEMM read, if neither was written since. A write between the two GEMMs that autograd does
    not count is not seen here either.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self.asked: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.waiting: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def for_forward(self, weight: Operand, size: Size) -> Tensor:
        """Return the weight compressed to that size; leave its other form for the backward GEMM, if that asked."""
        matrix, mask = weight.matrix, weight.mask
        if mask is None or not self._may_wait(matrix):
            return compressed(self.library, weight, *size)
        if self.waiting.pop(mask, None) is not None:
            self.asked.pop(mask, None)  # no backward GEMM followed the last forward GEMM
        asked = self.asked.get(mask)
        forms = None if asked is None else compress_both(self.library, weight, size, asked)
        if asked is None or forms is None:
            return compressed(self.library, weight, *size)
        self.waiting[mask] = Waiting(forms[1], asked, ref(matrix), _versions(matrix, mask))
        return forms[0]

    def for_backward(self, weight: Operand, size: Size) -> Tensor:
        """Return the weight compressed to that size, by the forward GEMM if it did so."""
        matrix, mask = weight.matrix, weight.mask
        if mask is None or not self._may_wait(matrix):
            return compressed(self.library, weight, *size)
        self.asked[mask] = size
        found = self.waiting.pop(mask, None)
        if found is None or found.weight() is not matrix:
            return compressed(self.library, weight, *size)
        is_same = found.size == size and found.versions == _versions(matrix, mask)
        return found.form if is_same else compressed(self.library, weight, *size)

    def _may_wait(self, matrix: Tensor) -> bool:
        """Return whether a form of the matrix may outlive the forward GEMM.

        CUDA graphs are recorded on streams other than the default one, by tools that account for all memory.
        """
        return not matrix.is_inference() and self.library.stream(matrix.device) == DEFAULT_STREAM


def _versions(weight: Tensor, mask: Tensor) -> tuple[int, int]:
    return weight._version, mask._version


@cache
def both_directions(library: Library) -> BothDirections:
    """Return the weights that a library multiplies in both directions."""
    return BothDirections(library)


def compress_both(library: Library, weight: Operand, size: Size, other_size: Size) -> tuple[Tensor, Tensor] | None:
    """Return a masked weight compressed along its dim and along the other one; None without a known layout."""
    matrix, mask = weight.matrix.detach(), weight.mask
    own, other = (packed_form(library, *wanted, matrix) for wanted in (size, other_size))
    if mask is None or own is None or other is None:
        return None
    from nmcompile.backends.triton.kernels.both_directions import pack_both

    is_along_rows = weight.dim == 1
    if matrix.stride(0) == 1:  # neighbours in memory are read together
        matrix, mask, is_along_rows = matrix.t(), mask.t(), not is_along_rows
    pack_both(matrix, mask, *((own, other) if is_along_rows else (other, own)))
    return own.positions, other.positions
