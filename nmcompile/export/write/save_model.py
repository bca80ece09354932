"""Model -> file, in full or not at all.

Weights of large models go to a second file whose name holds a hash of its content. So the old model finds its own
weights until the new one replaces it, and a copy of either model finds them after that.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx import ModelProto, TensorProto

from nmcompile.errors import ExportError, FileError
from nmcompile.files.staging import one_at_a_time
from nmcompile.files.write_atomically import REPLACED, UNCHANGED, failing, move_file, staging, sync_folder, write_synced

LARGEST = 2**31 - 1  # bytes; protobuf holds no more
SMALL = 1024  # bytes; tensors up to this size stay in the model even when it is split
PAGE = 4096  # bytes; tensors start at a page for runtimes to map them
PLAIN_NAME = re.compile(r"\w[\w. -]{0,199}", re.ASCII)
CHUNK = 2**20  # bytes


def save_model(model: ir.Model, path: str | os.PathLike[str]) -> int:
    """Write the model, and above 2 GiB its weights to `<name>.<hash>.data` beside it; return the bytes written.

    Raises:
        ExportError: the file cannot be written; the previous file is unchanged.
    """
    proto: ModelProto = ir.to_proto(model)
    with staged_model(Path(path)) as staged, _export_errors():
        written = _write_data(proto, staged) if _weights(proto) + SMALL * 1024 > LARGEST else 0
        content = proto.SerializeToString(deterministic=True)
        write_synced(staged, [content], Path(path))
    return written + len(content)


@contextlib.contextmanager
def staged_model(path: Path) -> Iterator[Path]:
    """Yield a path to write a model to; without an error it replaces the one at `path`, its data first.

    Raises:
        ExportError: `path` cannot be written; the previous file is unchanged.
    """
    with contextlib.ExitStack() as stack:
        with _export_errors():
            folder = stack.enter_context(staging(path))
        yield folder / path.name
        with _export_errors():
            _install(folder / path.name, path)


def _install(staged: Path, path: Path) -> None:
    """Move the data and then the model; then remove the data at `path` that no model names."""
    with contextlib.ExitStack() as stack:
        with failing(path, UNCHANGED):
            if stack.enter_context(one_at_a_time(path)):
                stack.callback(_remove_unnamed, path)
            moves = [(data, path.with_name(data.name)) for data in _data_files(staged)]
        for data, place in moves:
            move_file(data, place, UNCHANGED, like=path)
        sync_folder(path, UNCHANGED)
        move_file(staged, path, UNCHANGED)
        sync_folder(path, REPLACED)


def _remove_unnamed(path: Path) -> None:
    """Remove the unnamed data that can be removed; the next writer tries again."""
    with contextlib.suppress(OSError):
        unnamed = _data_files(path)
        for model in [path, *path.parent.glob("*.onnx")]:
            unnamed = [data for data in unnamed if not _names(model, data.name.encode())]
        for data in unnamed:
            data.unlink()


def _data_files(path: Path) -> list[Path]:
    """Return the files that hold, or once held, weights of a model at `path`."""
    name = re.compile(re.escape(_data_prefix(path)) + r"\.[0-9a-f]{16}\.data")
    return [path.with_name(entry) for entry in sorted(os.listdir(path.parent)) if name.fullmatch(entry)]


def _data_prefix(path: Path) -> str:
    """Return the model's name, or a hash if it is too long or other systems and runtimes could misread it."""
    if PLAIN_NAME.fullmatch(path.name):
        return path.name
    return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]


def _names(model: Path, data: bytes) -> bool:
    """Return whether a model may name a data file: its name is among the model's bytes, or they cannot be read."""
    try:
        if not model.is_file():
            return False
        with open(model, "rb") as file:
            end = b""
            while part := file.read(CHUNK):
                if data in end + part:
                    return True
                end = part[-len(data) :]
    except OSError:
        return True
    return False


def _weights(proto: ModelProto) -> int:
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer)


def _write_data(proto: ModelProto, staged: Path) -> int:
    """Move the large initializers out of the model, in place, into a file beside it; return the file's size."""
    large = [tensor for tensor in proto.graph.initializer if len(tensor.raw_data) > SMALL]
    digest, unnamed = hashlib.sha256(), staged.with_name("data")
    write_synced(unnamed, _moved(large, digest.update), staged)
    data = staged.with_name(f"{_data_prefix(staged)}.{digest.hexdigest()[:16]}.data")
    move_file(unnamed, data, UNCHANGED)
    for tensor in large:
        tensor.external_data[0].value = data.name
    return data.stat().st_size


def _moved(tensors: Sequence[TensorProto], update: Callable[[bytes], object]) -> Iterator[bytes]:
    """Yield the content of the data file in parts, passing each to `update`, and remove it from the tensors."""
    position = 0
    for tensor in tensors:
        content = tensor.raw_data
        padding = bytes(-position % PAGE)
        fields = {"location": "", "offset": position + len(padding), "length": len(content)}
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in fields.items():
            tensor.external_data.add(key=key, value=str(value))
        for part in (padding, content):
            update(part)
            yield part
        position += len(padding) + len(content)


@contextlib.contextmanager
def _export_errors() -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise ExportError(str(error)) from error
