"""Model -> file, whole or not at all."""

import os
from pathlib import Path

import onnx_ir as ir
from onnx import ModelProto, TensorProto

from nmcompile.errors import ExportError
from nmcompile.files import write_atomically

LARGEST = 2**31 - 1  # bytes; protobuf holds no more
SMALL = 1024  # bytes; tensors up to here stay in the model even when it is split


def save_model(model: ir.Model, path: str | os.PathLike[str]) -> int:
    """Write the model, and above 2 GiB its weights to `<name>.data` beside it; returns the bytes written.

    Raises:
        ExportError: the file cannot be written; what was there before still is.
    """
    path = Path(path)
    proto: ModelProto = ir.to_proto(model)
    try:
        written = 0
        if _weights(proto) + SMALL * 1024 > LARGEST:
            data = _split(proto, path.name + ".data")
            write_atomically(path.with_name(path.name + ".data"), data)
            written = len(data)
        content = proto.SerializeToString(deterministic=True)
        write_atomically(path, content)
    except OSError as error:
        raise ExportError(f"{path} cannot be written ({error.strerror}); nothing was changed there") from error
    return written + len(content)


def _weights(proto: ModelProto) -> int:
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer)


def _split(proto: ModelProto, name: str) -> bytes:
    """Move the large initializers out of the model, in place, into the content of a file."""
    content = bytearray()
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) <= SMALL:
            continue
        content.extend(bytes(-len(content) % 4096))  # page-aligned, so that runtimes can map them
        fields = {"location": name, "offset": len(content), "length": len(tensor.raw_data)}
        content.extend(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in fields.items():
            tensor.external_data.add(key=key, value=str(value))
    return bytes(content)
