"""Untrusted ONNX files, which are checked in full before a runtime opens them.

Runtimes check less than this. ONNX Runtime, for example, follows a hard link to any file of the same disk, and
allocates the size that a tensor declares.
"""

import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, SparseTensorProto, TensorProto, numpy_helper

from nmcompile.checks import check_path
from nmcompile.errors import FileError
from nmcompile.files.read_files import read_regular

LARGEST = 2**31 - 1  # bytes; protobuf reads no more
LARGEST_EXTERNAL = 2**36  # bytes of all tensors in files beside a model, counted once per declaration
SUB_BYTE: dict[int, int] = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
}
DENSEST = 4  # elements that one stored byte can stand for: 2-bit integers


@dataclass(frozen=True)
class OnnxFile:
    """A checked model.

    Attributes:
        name: its name in error messages.
        proto: the model; weights in files beside it are not loaded.
        content: the bytes that were checked; give a runtime these, not the path, unless `path` is set.
        path: the file, if some weights lie in other files beside it, which a runtime finds only by path.
    """

    name: str
    proto: ModelProto
    content: bytes
    path: Path | None


def open_onnx(source: str | os.PathLike[str] | bytes) -> OnnxFile:
    """Read and check a model, given as a file or as its bytes.

    Raises:
        FileError: the file is missing, truncated or not ONNX; weights lie outside the file's folder or are a link;
            tensors declare another size than is stored, or more than 64 GiB outside the model.
    """
    if isinstance(source, bytes):
        return _checked("the model", source, None)
    path = check_path("the model", source)
    return _checked(str(path), read_regular(path, LARGEST), path)


def _checked(name: str, content: bytes, path: Path | None) -> OnnxFile:
    try:
        proto = onnx.load_model_from_string(content)
        path = path if _check_tensors(proto, path) else None
        onnx.checker.check_model(content if path is None else path)
    except DecodeError as error:
        raise FileError(f"{name}: not an ONNX model, or truncated") from error
    except _Refused as error:
        raise FileError(f"{name}: {error}") from error
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise FileError(f"{name}: not a valid ONNX model: {str(error).strip()}") from error
    return OnnxFile(name, proto, content, path)


def read_tensor(file: OnnxFile, tensor: TensorProto) -> npt.NDArray[np.generic]:
    """Return a tensor's content, read from the file beside the model if it lies there; the model does not cache it.

    Raises:
        FileError: it holds another number of elements than it declares, or its file has changed.
    """
    try:
        if tensor.data_location == TensorProto.EXTERNAL:
            stored = TensorProto(dims=tensor.dims, data_type=tensor.data_type, name=tensor.name)
            stored.raw_data = _external_content(tensor, file.path)
            tensor = stored
        return numpy_helper.to_array(tensor)
    except (ValueError, OSError, _Refused) as error:
        raise FileError(f"{file.name}: tensor {tensor.name!r} cannot be read ({error})") from error


class _Refused(Exception):
    """Reason why a tensor is refused."""


def _tensors(message: Message) -> Iterator[TensorProto]:
    """Yield every tensor of a model, also in subgraphs, functions and attributes."""
    if isinstance(message, TensorProto):
        yield message
        return
    if isinstance(message, SparseTensorProto):
        raise _Refused("a sparse tensor, which can declare any size; store it dense")
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _tensors(part)


def _check_tensors(proto: ModelProto, path: Path | None) -> bool:
    """Check every tensor; return whether any lies in another file."""
    external = [size for tensor in _tensors(proto) if (size := _check_tensor(tensor, path)) is not None]
    if sum(external) > LARGEST_EXTERNAL:
        raise _Refused(f"tensors of {sum(external)} bytes in other files; at most {LARGEST_EXTERNAL} are read")
    return bool(external)


def _check_tensor(tensor: TensorProto, path: Path | None) -> int | None:
    """Compare a tensor's declared size with its stored size; return the bytes in another file, if any."""
    external = tensor.data_location == TensorProto.EXTERNAL
    declared = _declared_bytes(tensor)
    stored = _external_place(tensor, path)[2] if external else len(tensor.raw_data)
    in_fields = not external and not tensor.HasField("raw_data")  # one number per entry; runtimes count entries
    if declared != stored and not (in_fields and math.prod(tensor.dims) <= DENSEST * tensor.ByteSize()):
        raise _Refused(f"tensor {tensor.name!r} of shape {list(tensor.dims)} needs {declared} bytes and has {stored}")
    return stored if external else None


def _declared_bytes(tensor: TensorProto) -> int:
    if any(size < 0 for size in tensor.dims):
        raise _Refused(f"tensor {tensor.name!r} of shape {list(tensor.dims)}")
    elements: int = math.prod(tensor.dims)
    return (elements * _bits(tensor) + 7) // 8


def _bits(tensor: TensorProto) -> int:
    if tensor.data_type in SUB_BYTE:
        return SUB_BYTE[tensor.data_type]
    try:
        return 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError as error:
        raise _Refused(f"tensor {tensor.name!r} of unknown type {tensor.data_type}") from error


def _external_place(tensor: TensorProto, path: Path | None) -> tuple[Path, int, int]:
    """Return the file that a tensor lies in, its offset there, and its length in bytes."""
    fields = {entry.key: entry.value for entry in tensor.external_data}
    location = fields.get("location", "")
    file, size = _external_file(tensor.name, location, path)
    offset = int(fields.get("offset", 0))
    length = int(fields.get("length", size - offset))
    if offset < 0 or length < 0 or offset + length > size:
        raise _Refused(f"tensor {tensor.name!r}: bytes {offset} to {offset + length} of {location!r}, which has {size}")
    return file, offset, length


def _external_content(tensor: TensorProto, path: Path | None) -> bytes:
    place, offset, length = _external_place(tensor, path)
    with open(place, "rb") as file:
        file.seek(offset)
        return file.read(length)


def _external_file(tensor: str, location: str, path: Path | None) -> tuple[Path, int]:
    """Return a file that is really in the model's folder, and its size."""
    parts = PureWindowsPath(location).parts  # splits at both separators and knows drives
    if path is None:
        raise _Refused(f"tensor {tensor!r} lies in another file, {location!r}; give the model's path, not its bytes")
    if not parts or PureWindowsPath(location).anchor or ".." in parts:
        raise _Refused(f"tensor {tensor!r} lies in {location!r}, outside the model's folder")
    steps = [path.parent.joinpath(*parts[: count + 1]) for count in range(len(parts))]
    if any(step.is_symlink() for step in steps):
        raise _Refused(f"tensor {tensor!r} lies in {location!r}, a symbolic link")
    try:
        status = steps[-1].stat()
    except OSError as error:
        raise _Refused(f"tensor {tensor!r} lies in {location!r}, which cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise _Refused(f"tensor {tensor!r} lies in {location!r}, a hard link or not a regular file")
    return steps[-1], status.st_size
