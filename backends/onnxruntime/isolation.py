"""A model in a process of its own: whatever kills ONNX Runtime there is an error here."""

import contextlib
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor

from nmcompile.backends.onnxruntime import worker
from nmcompile.backends.onnxruntime.values import Value
from nmcompile.checks import check_number
from nmcompile.errors import BackendUnavailable, FileError, LoweringError, NMCompileError
from nmcompile.files.open_onnx import OnnxFile
from nmcompile.native import kernels

GRACE = 5  # seconds after which the process ends itself if this one is gone


@dataclass(frozen=True)
class Limits:
    """Limits of a model that runs in a process of its own.

    Attributes:
        seconds: for opening it, and for each call.
        memory: bytes beyond those that ONNX Runtime takes before it opens the model; on Linux only.
    """

    seconds: float = 60.0
    memory: int = 4 * 2**30

    def __post_init__(self) -> None:
        check_number("seconds", self.seconds, Real, 1e-3, 1e6, "seconds above zero, at most a million")
        check_number("memory", self.memory, Integral, 1, 2**50, "a number of bytes above zero")


class IsolatedSession:
    """An ONNX Runtime session in another process, which ends with this object.

    Attributes:
        inputs, outputs: as the model declares them.
        device: the CPU.
    """

    device = torch.device("cpu")

    def __init__(self, model: OnnxFile, threads: int | None, limits: Limits, native: bool) -> None:
        initialized = {tensor.name for tensor in model.proto.graph.initializer}
        given = [value for value in model.proto.graph.input if value.name not in initialized]
        self.inputs = tuple(Value.declared(value) for value in given)
        self.outputs = tuple(Value.declared(value) for value in model.proto.graph.output)
        self._name, self._limits = model.name, limits
        self._expired = threading.Event()
        self._lock = threading.Lock()
        self._process = _start()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self.close = weakref.finalize(self, _stop, self._process)
        settings = struct.pack("<QqQ", limits.memory, threads or 0, math.ceil(limits.seconds) + GRACE)
        library = os.fsencode(kernels.__file__) if native else b""
        source: list[worker.Part] = (
            [b"content", model.content] if model.path is None else [b"path", os.fsencode(model.path.absolute())]
        )
        self._ask([settings, library, *source], FileError, "open")

    def run(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Run the model on contiguous tensors.

        Raises:
            LoweringError: an operator failed, the process died, or it took too much time or memory.
        """
        parts: list[worker.Part] = []
        for value in self.inputs:
            x = tensors[value.name]
            parts += [value.name.encode(), worker.pack_type(value.onnx_dtype, x.shape), _bytes(x)]
        answer = self._ask(parts, LoweringError, "run")
        try:
            pairs = list(zip(self.outputs, answer[::2], answer[1::2], strict=True))
            return tuple(_tensor(value, kind, content) for value, kind, content in pairs)
        except (worker.Malformed, ValueError) as error:
            self.close()
            raise LoweringError(f"{self._name}: its process did not return its outputs") from error

    def _ask(self, parts: Sequence[worker.Part], kind: type[NMCompileError], doing: str) -> list[bytearray]:
        """Send a message and return its answer; any failure of the process ends it."""
        with self._lock:
            if not self.close.alive:
                raise kind(f"{self._name} is closed, or its process has died; open it again")
            timer = threading.Timer(self._limits.seconds, _expire, (self._process, self._expired))
            timer.start()
            try:
                worker.send(self._requests, parts)
                status, *answer = worker.receive(self._answers, self._limits.memory)
            except (OSError, EOFError, ValueError, worker.Malformed) as error:
                reason = self._reason(error)
                self.close()
                raise kind(f"{self._name}: ONNX Runtime could not {doing} it: {reason}") from error
            except BaseException:
                self.close()  # else the answer to this message would be taken for the next one's
                raise
            finally:
                timer.cancel()
        if status != worker.OK:
            message = b" ".join(answer).decode(errors="replace")
            if doing == "open":
                self.close()
            raise kind(f"{self._name}: ONNX Runtime could not {doing} it: {message}")
        return answer

    def _reason(self, error: Exception) -> str:
        """Return why there is no answer."""
        if self._expired.is_set():
            return f"it did not end within {self._limits.seconds:g} seconds"
        if not isinstance(error, OSError | EOFError):
            return "its process did not send an answer"
        code = self._process.wait()
        if code < 0:
            return f"its process died of {signal.Signals(-code).name} (it may have {self._limits.memory} bytes)"
        return f"its process ended with status {code}; is onnxruntime installed for {sys.executable}?"


def _start() -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise BackendUnavailable("there is no Python executable to start for isolated=True; leave it out")
    return subprocess.Popen(
        [sys.executable, str(Path(worker.__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},  # each arena counts as memory
        start_new_session=True,  # Ctrl-C interrupts this process only
    )


def _expire(process: subprocess.Popen[bytes], expired: threading.Event) -> None:
    """End the process. Not a method: a timer that referenced the session would keep it alive."""
    expired.set()
    process.kill()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()


def _bytes(x: Tensor) -> memoryview:
    """Return the content of a contiguous tensor, for which NumPy may have no type."""
    return x.reshape(-1).view(torch.uint8).numpy().data if x.numel() else memoryview(b"")


def _tensor(value: Value, kind: bytes | bytearray, content: bytearray) -> Tensor:
    onnx_dtype, shape = worker.unpack_type(kind)
    if onnx_dtype != value.onnx_dtype or len(content) != math.prod(shape) * value.dtype.itemsize:
        raise worker.Malformed(f"output {value.name!r}")
    if not content:
        return torch.empty(shape, dtype=value.dtype)
    return torch.frombuffer(content, dtype=value.dtype).view(shape)
