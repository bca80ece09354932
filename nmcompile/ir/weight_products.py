"""Products with a weight as Python code calls them: which function, and which part of a parameter it reads.

F.linear(x, W), x @ W, W @ x               one matrix
F.linear(x, W[i]), x @ W[i]                a matrix of a stack (experts, rows, columns)
torch.bmm(x, W), F.grouped_mm(x, W, ends)  every matrix of a stack, each with inputs of its own
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverloadPacket

from nmcompile.arguments import Args, Kwargs
from nmcompile.ir.einsum import weight_einsum
from nmcompile.ir.storage_key import storage_key

Function = Callable[..., object]
OF_TRANSFORMERS = "transformers::grouped_mm_fallback"
"""The operator that Hugging Face's experts take where torch has no grouped product."""


@dataclass(frozen=True)
class Product:
    """A product with a weight.

    Args:
        weight: the operand that may be a weight: a matrix, or a stack of matrices.
        inputs: gives the input of each matrix, (..., in).
        join: makes the product's result of the outputs, (..., out).
        is_out_first: whether the matrices are (out, in).
        bias: (out,), or None.
    """

    weight: Tensor
    inputs: Callable[[], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]
    is_out_first: bool = False
    bias: Tensor | None = None


def _only(outputs: Sequence[Tensor]) -> Tensor:
    (output,) = outputs
    return output


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Product]:
    yield Product(weight, lambda: [input], _only, is_out_first=True, bias=bias)


def _matmul(input: Tensor, other: Tensor) -> Iterator[Product]:
    if other.dim() == 2:
        yield Product(other, lambda: [input], _only)


def _left_matmul(input: Tensor, other: Tensor) -> Iterator[Product]:
    if input.dim() == 2 and other.dim() > 1:
        yield Product(input, lambda: [other.mT], lambda outputs: _only(outputs).mT, is_out_first=True)


def _batched(input: Tensor, mat2: Tensor) -> Iterator[Product]:
    if input.dim() == mat2.dim() == 3 and len(input) == len(mat2):
        yield Product(mat2, lambda: input.unbind(0), lambda outputs: torch.stack(list(outputs)))


def _grouped(
    input: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Iterator[Product]:
    if offs is None or bias is not None or out_dtype is not None or (input.dim(), weight.dim()) != (2, 3):
        return

    def inputs() -> Sequence[Tensor]:
        ends = offs.tolist()
        return [input[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def join(outputs: Sequence[Tensor]) -> Tensor:
        behind = len(input) - sum(map(len, outputs))
        return torch.cat([*outputs, outputs[0].new_zeros(behind, outputs[0].shape[1])])

    yield Product(weight, inputs, join)


def _einsum(equation: str, *operands: Tensor) -> Iterator[Product]:
    input, weight = operands
    for number, (x, w) in ((1, (input, weight)), (0, (weight, input))):
        found = weight_einsum(equation, number)
        if found is not None:
            inputs, join = (lambda x=x, f=found, w=w: f.inputs(x, len(w))), found.join
            yield Product(w, inputs, join, found.is_out_first)


READERS: dict[Function, tuple[Callable[..., Iterator[Product]], ...]] = {
    F.linear: (_linear,),
    torch.einsum: (_einsum,),
    **dict.fromkeys((torch.bmm, Tensor.bmm), (_batched,)),
    **dict.fromkeys(
        (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), (_matmul, _left_matmul, _batched)
    ),
    **({torch._grouped_mm: (_grouped,)} if hasattr(torch, "_grouped_mm") else {}),  # what F.grouped_mm calls
}


def _opened(function: Function) -> Function:
    """Return a copy of a Python function of torch that runs its code where a mode would be given the whole call."""
    assert isinstance(function, FunctionType)
    own = function.__globals__ | {"has_torch_function": lambda tensors: False}
    return FunctionType(function.__code__, own, function.__name__, function.__defaults__)


COMPOSED: dict[Function, Function] = {
    F.multi_head_attention_forward: _opened(F.multi_head_attention_forward),
}
"""Functions of torch that multiply by several weights, with functions that do so by calls that a mode sees."""


def products(function: Function, args: Args, kwargs: Kwargs) -> Sequence[Product]:
    """Return how a call of torch can be read as a product with a weight: once for each operand that may be one."""
    readers = READERS.get(function)
    if readers is None:
        is_grouped = isinstance(function, OpOverloadPacket) and function._qualified_op_name == OF_TRANSFORMERS
        readers = (_grouped,) if is_grouped else ()
    found: list[Product] = []
    for read in readers:
        with suppress(TypeError, AttributeError):  # another form of the call, with out= say
            found += read(*args, **kwargs)
    return found


@dataclass(frozen=True)
class Part:
    """A part of a parameter that a product reads.

    Args:
        is_stored_in_out: whether the parameter's matrices are (in, out).
        index: which matrix of a stack; None for all of the parameter.
    """

    is_stored_in_out: bool
    index: int | None = None


def part_of(parameter: Tensor, product: Product) -> Part | None:
    """Return the part of a parameter that a product reads; None if it reads another tensor, or other parts."""
    view, dims = product.weight, parameter.dim()
    if (dims, view.dim()) not in ((2, 2), (3, 3), (3, 2)) or not _shares_memory(view, parameter):
        return None
    is_turned = _is_turned(parameter, view)
    if is_turned is None or view.shape[:-2] not in (parameter.shape[:-2], ()) or not parameter.is_contiguous():
        return None
    is_stored_in_out = product.is_out_first == is_turned
    if dims == view.dim():
        is_whole = view.stride()[:-2] == parameter.stride()[:-2] and _is_whole(view, parameter)
        return Part(is_stored_in_out) if is_whole else None
    # Dynamo knows no offsets: it leaves such code to Python.
    index, rest = divmod(int(view.storage_offset() - parameter.storage_offset()), int(parameter.stride(0)))
    return Part(is_stored_in_out, index) if not rest and 0 <= index < len(parameter) else None


def _shares_memory(view: Tensor, parameter: Tensor) -> bool:
    if view is parameter:
        return True
    if torch.compiler.is_dynamo_compiling():  # which knows no storages
        return view._base is parameter
    return storage_key(view) == storage_key(parameter)


def _is_whole(view: Tensor, parameter: Tensor) -> bool:
    """Return whether a view of as many elements starts where the parameter does; one storage may hold several."""
    return torch.compiler.is_dynamo_compiling() or view.storage_offset() == parameter.storage_offset()


def _is_turned(parameter: Tensor, view: Tensor) -> bool | None:
    """Return whether the matrices of a view are the parameter's transposed; None if they are others."""
    sizes, strides = parameter.shape[-2:], parameter.stride()[-2:]
    if view.shape[-2:] == sizes and view.stride()[-2:] == strides:
        return False
    return True if view.shape[-2:] == sizes[::-1] and view.stride()[-2:] == strides[::-1] else None
