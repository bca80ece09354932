"""The process that an isolated model runs in: a script that depends on ONNX Runtime and NumPy, but not on nmcompile.

It reads messages from its input and answers each on its output. A message is a number of parts, and each part a length
and bytes, so neither side has to trust a parser of the other. A tensor takes two parts: its type with its shape, and
its content.
"""

import contextlib
import ctypes
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Part = bytes | bytearray | memoryview
OK, ERROR = b"ok", b"error"
DTYPES = {
    1: "f4", 2: "u1", 3: "i1", 6: "i4", 7: "i8", 9: "?", 10: "f2", 11: "f8", 16: "u2",
}  # fmt: skip
"""NumPy's storage type for the elements of each ONNX type; NumPy has no bfloat16, which is 16."""
MOST_PARTS = 2**20
MOST_DIMS = 64
MOST_BYTES = 2**40  # of a message to this process, whose memory is limited otherwise


class Malformed(Exception):
    """A message that is malformed, or larger than allowed."""


def send(stream: IO[bytes], parts: Sequence[Part]) -> None:
    """Write a message; its parts are bytes-like objects."""
    stream.write(struct.pack("<I", len(parts)))
    for part in parts:
        view = memoryview(part).cast("B")
        stream.write(struct.pack("<Q", len(view)))
        stream.write(view)
    stream.flush()


def receive(stream: IO[bytes], largest: int) -> list[bytearray]:
    """Read a message of at most `largest` bytes.

    Raises:
        EOFError: the other side is gone.
        Malformed: the message is larger.
    """
    (count,) = struct.unpack("<I", _read(stream, 4))
    if count > MOST_PARTS:
        raise Malformed(f"{count} parts")
    parts: list[bytearray] = []
    for _ in range(count):
        (length,) = struct.unpack("<Q", _read(stream, 8))
        largest -= length
        if largest < 0:
            raise Malformed(f"a part of {length} bytes")
        parts.append(_read(stream, length))
    return parts


def _read(stream: IO[bytes], length: int) -> bytearray:
    content = bytearray(length)
    view = memoryview(content)
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        view = view[count:]
    return content


def pack_type(onnx_dtype: int, shape: Iterable[int]) -> bytes:
    """Encode a tensor's type and shape."""
    sizes = tuple(shape)
    return struct.pack(f"<BB{len(sizes)}Q", onnx_dtype, len(sizes), *sizes)


def unpack_type(part: bytes | bytearray) -> tuple[int, tuple[int, ...]]:
    """Decode a tensor's type and shape.

    Raises:
        Malformed: the bytes are not a type and a shape.
    """
    if len(part) < 2 or part[1] > MOST_DIMS or len(part) != 2 + 8 * part[1]:
        raise Malformed("a tensor's type")
    onnx_dtype, _, *sizes = struct.unpack(f"<BB{part[1]}Q", part)
    return onnx_dtype, tuple(sizes)


def main() -> None:
    """Open the model of the first message, and run it on the tensors of each further message."""
    del sys.path[0]  # the folder of this script
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # output that native code prints is not a message
    import onnxruntime

    settings, library, kind, model = receive(requests, MOST_BYTES)
    memory, threads, seconds = struct.unpack("<QqQ", settings)
    _limit(memory)
    session: list[InferenceSession] = []

    def open_model(_: Sequence[bytearray]) -> list[Part]:
        source = bytes(model) if kind == b"content" else os.fsdecode(bytes(model))
        session.append(_open(onnxruntime, source, threads, os.fsdecode(bytes(library))))
        return []

    _answer(answers, open_model, [], seconds)
    with contextlib.suppress(EOFError):  # the asking process is gone
        while session:
            message = receive(requests, MOST_BYTES)
            _answer(answers, lambda inputs: _run(onnxruntime, session[0], inputs), message, seconds)


def _answer(
    answers: IO[bytes], do: Callable[[list[bytearray]], list[Part]], message: list[bytearray], seconds: int
) -> None:
    _alarm(seconds)
    try:
        answer = [OK, *do(message)]
    except Exception as error:  # ONNX Runtime's errors share no other base
        answer = [ERROR, str(error).encode(errors="replace")]
    _alarm(0)
    send(answers, answer)


def _open(onnxruntime: ModuleType, source: bytes | str, threads: int, library: str) -> "InferenceSession":
    """Open a model, with the operators of a library unless its name is empty."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads > 0:
        options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _run(onnxruntime: ModuleType, session: "InferenceSession", message: Sequence[bytearray]) -> list[Part]:
    """Run the model on (name, type, content) of each input; return (type, content) of each output."""
    import numpy as np

    feeds, alive = {}, []
    for name, kind, content in zip(message[::3], message[1::3], message[2::3], strict=True):
        onnx_dtype, shape = unpack_type(kind)
        array = np.ndarray(shape, DTYPES[onnx_dtype], content or bytearray(1))
        alive.append(array)
        feeds[name.decode()] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, onnx_dtype)
    parts: list[Part] = []
    for value in session.run_with_ort_values([output.name for output in session.get_outputs()], feeds):
        shape = tuple(value.shape())
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPES[value.element_type()]).itemsize
        parts += [pack_type(value.element_type(), shape), ctypes.string_at(value.data_ptr(), size)]
    return parts


def _limit(memory: int) -> None:
    """Limit the process to `memory` bytes beyond its present memory, no written files, and no core dump."""
    with contextlib.suppress(ImportError):  # Windows
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        with contextlib.suppress(FileNotFoundError), open("/proc/self/statm") as file:  # Linux only
            most = int(file.read().split()[0]) * resource.getpagesize() + memory
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _alarm(seconds: int) -> None:
    """End the process after so many seconds, even if its parent is gone; 0 cancels the alarm."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
