"""Inputs and outputs of a model: names, dtypes and shapes, and checks of tensors against them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from onnx import TensorProto, TensorShapeProto, ValueInfoProto
from torch import Tensor

from nmcompile.errors import FileError, OperandError, nearest

if TYPE_CHECKING:
    from onnxruntime import NodeArg

DTYPES = {
    "tensor(float)": (torch.float32, TensorProto.FLOAT),
    "tensor(double)": (torch.float64, TensorProto.DOUBLE),
    "tensor(float16)": (torch.float16, TensorProto.FLOAT16),
    "tensor(bfloat16)": (torch.bfloat16, TensorProto.BFLOAT16),
    "tensor(int8)": (torch.int8, TensorProto.INT8),
    "tensor(uint8)": (torch.uint8, TensorProto.UINT8),
    "tensor(int32)": (torch.int32, TensorProto.INT32),
    "tensor(int64)": (torch.int64, TensorProto.INT64),
    "tensor(bool)": (torch.bool, TensorProto.BOOL),
}
BY_NUMBER: dict[int, torch.dtype] = {number: dtype for dtype, number in DTYPES.values()}


@dataclass(frozen=True)
class Value:
    """An input or output of a model; a dimension is a size, a name, or None if nothing is known."""

    name: str
    dtype: torch.dtype
    onnx_dtype: int
    shape: tuple[int | str | None, ...]

    @classmethod
    def of(cls, argument: "NodeArg") -> "Value":
        """Make a value from ONNX Runtime's description."""
        if argument.type not in DTYPES:
            raise FileError(f"input or output {argument.name!r} is a {argument.type}; expected a tensor of numbers")
        dtype, onnx_dtype = DTYPES[argument.type]
        return cls(argument.name, dtype, onnx_dtype, tuple(argument.shape))

    @classmethod
    def declared(cls, value: ValueInfoProto) -> "Value":
        """Make a value from the model's own description."""
        tensor = value.type.tensor_type
        dtype = BY_NUMBER.get(tensor.elem_type)
        if dtype is None or value.type.WhichOneof("value") != "tensor_type":
            raise FileError(
                f"input or output {value.name!r} has a type that torch does not have; expected a tensor of numbers"
            )
        return cls(value.name, dtype, tensor.elem_type, tuple(map(_size, tensor.shape.dim)))


def _size(dim: TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value >= 0 else None
    return str(dim.dim_param) or None


def checked_inputs(
    values: Sequence[Value], args: Sequence[Tensor], kwargs: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Return the tensors by name, checked, contiguous and without gradient history."""
    tensors = _by_name([value.name for value in values], args, kwargs)
    sizes: dict[str, int] = {}
    for value in values:
        _check(value, tensors[value.name], device, sizes)
    return {name: tensor.detach().contiguous().resolve_neg() for name, tensor in tensors.items()}


def _by_name(names: Sequence[str], args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if len(args) > len(names):
        raise OperandError(f"{len(args)} inputs given; the model takes {len(names)}: {', '.join(names)}")
    tensors = dict(zip(names, args, strict=False))
    for name, tensor in kwargs.items():
        if name in tensors:
            raise OperandError(f"input {name!r} is given twice")
        if name not in names:
            raise OperandError(f"no input {name!r}; {nearest(name, names)}")
        tensors[name] = tensor
    missing = [name for name in names if name not in tensors]
    if missing:
        raise OperandError(f"input {missing[0]!r} is missing; the model takes {', '.join(names)}")
    return tensors


def _check(value: Value, tensor: Tensor, device: torch.device, sizes: dict[str, int]) -> None:
    """Raise unless the tensor fits; `sizes` holds the size of each named dimension seen so far."""
    shape = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in value.shape)
    expected = f"input {value.name!r}: expected {value.dtype} {_shown(shape)} on {device}"
    if not isinstance(tensor, Tensor):
        raise OperandError(f"{expected}, got a {type(tensor).__name__}")
    fits = tensor.dtype == value.dtype and tensor.device == device and tensor.dim() == len(shape)
    for declared, size in zip(shape, tensor.shape, strict=False):
        known = sizes.setdefault(declared, size) if isinstance(declared, str) else declared
        fits = fits and known in (None, size)
    if not fits:
        raise OperandError(f"{expected}, got {tensor.dtype} {_shown(tensor.shape)} on {tensor.device}")


def _shown(shape: Sequence[int | str | None]) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
