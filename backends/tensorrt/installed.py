"""The installed TensorRT: `tensorrt`, or `tensorrt_rtx`, the one for consumer GPUs with the same interface."""

import importlib
from types import ModuleType

import torch

from nmcompile.errors import BackendUnavailable
from nmcompile.ir.protocols import Support

FLAVOURS = ("tensorrt", "tensorrt_rtx")


def find_tensorrt() -> ModuleType:
    """Return the first flavour that can be imported.

    Raises:
        BackendUnavailable: there is none.
    """
    problems = []
    for name in FLAVOURS:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: the module is there, a CUDA library is not
            problems.append(f"{name}: {error}")
    install = "`pip install tensorrt`, or tensorrt_rtx from NVIDIA's TensorRT for RTX"
    raise BackendUnavailable(f"TensorRT cannot be imported ({'; '.join(problems)}); install it with {install}")


def tensorrt_support() -> Support:
    """Return whether `build_engine` can run here; never raise."""
    try:
        trt = find_tensorrt()
    except BackendUnavailable as error:
        return Support(False, str(error))
    return Support(True, f"{trt.__name__} {trt.__version__}")


def gpu_name() -> str | None:
    """Return the name of the GPU that plans are built for and loaded on; None without a GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
