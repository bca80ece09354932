"""cuSPARSELt through its C interface, and the CUDA streams that it works on.

PyTorch's own operator makes a new plan in every call, for which the GPU waits longer than most products take.
"""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch

from nmcompile.errors import LibraryError
from nmcompile.ir.protocols import Support

SONAME = "libcusparseLt.so.0"  # PyTorch has loaded it
STRUCTURE = 4096  # bytes for one of the library's opaque structures; the largest known ones have 1024
Structure = ctypes.Array[ctypes.c_char]
OLDEST = (8, 0)
KNOWN_BAD = {(0, 8, 0): "slower than others on Hopper and L4; nvidia-cusparselt-cu13 0.8.1 and later are not"}

_libraries: "WeakValueDictionary[str, Library]" = WeakValueDictionary()


class Library:
    """The library that PyTorch has loaded; a process needs one, `CUSPARSELT`.

    It is the backend's only way to the library and to CUDA. A test replaces it by one that computes on CPU tensors.

    Args:
        name: by which operators, which take no Python object, find the library.
    """

    device_type = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def __init__(self, name: str) -> None:
        self.name = name
        self._handles: dict[torch.device, Structure] = {}
        _libraries[name] = self

    def __reduce__(self) -> tuple[Callable[[str], "Library"], tuple[str]]:
        return library_named, (self.name,)  # a model that is saved or copied keeps its backends

    def support(self) -> Support:
        """Return whether the library runs on this machine, and its version; never raise."""
        if torch.version.hip is not None or not torch.cuda.is_available():
            return Support(False, "no NVIDIA GPU, or a torch without CUDA")
        if not torch.backends.cusparselt.is_available():
            return Support(False, "this torch was built without cuSPARSELt")
        capability = torch.cuda.get_device_capability()
        if capability < OLDEST:
            return Support(False, f"{torch.cuda.get_device_name()} has compute capability {capability}, below {OLDEST}")
        try:
            version = self.version()
        except OSError:
            return Support(False, f"{SONAME}, which PyTorch is built for, cannot be loaded")
        known_bad = KNOWN_BAD.get(version)
        return Support(True, f"cuSPARSELt {'.'.join(map(str, version))}" + (f", {known_bad}" if known_bad else ""))

    def version(self) -> tuple[int, int, int]:
        """Return the version of the library that is loaded, which may differ from the one PyTorch was built with."""
        numbers = [ctypes.c_int() for _ in range(3)]
        for part, number in enumerate(numbers):
            self.call("cusparseLtGetProperty", part, ctypes.byref(number))
        major, minor, patch = (number.value for number in numbers)
        return major, minor, patch

    @cached_property
    def functions(self) -> Any:
        """The C functions by name.

        Raises:
            OSError: the library cannot be loaded.
        """
        functions = ctypes.CDLL(SONAME)
        functions.cusparseLtMatmul.argtypes = [ctypes.c_void_p] * 10 + [ctypes.c_int32]
        functions.cusparseLtGetErrorString.restype = ctypes.c_char_p
        return functions

    def call(self, name: str, *arguments: object) -> None:
        """Call a C function.

        Raises:
            LibraryError: it fails.
        """
        status = getattr(self.functions, name)(*arguments)
        if status:
            text = (self.functions.cusparseLtGetErrorString(status) or b"").decode()
            raise LibraryError(f"{name} of {SONAME} failed with {status} ({text})")

    def handle(self, device: torch.device) -> Structure:
        """Return the library's state for a device."""
        if device not in self._handles:
            handle = ctypes.create_string_buffer(STRUCTURE)
            self.call("cusparseLtInit", handle)
            self._handles[device] = handle
        return self._handles[device]

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """Make a device the current one."""
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        """Return the stream that takes the work for a device."""
        return torch.cuda.current_stream(device).cuda_stream

    def is_capturing(self, device: torch.device) -> bool:
        """Return whether a CUDA graph is being captured on a device."""
        if device.type != "cuda":
            return False
        with self.on(device):
            return torch.cuda.is_current_stream_capturing()


CUSPARSELT = Library("cusparselt")


def library_named(name: str) -> Library:
    """Return the library of that name.

    Raises:
        LibraryError: nobody has it any more.
    """
    library = _libraries.get(name)
    if library is None:
        raise LibraryError(f"the library {name!r}, for which this graph was compiled, is gone; keep its Library object")
    return library
