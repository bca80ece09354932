"""Sessions that run where they were asked to run."""

from collections.abc import Sequence

import onnxruntime
import torch

from nmcompile.errors import BackendUnavailable, FileError, nearest
from nmcompile.onnx_files import OnnxFile

INSTALL = {
    "CUDAExecutionProvider": "pip install onnxruntime-gpu",
    "TensorrtExecutionProvider": "pip install onnxruntime-gpu tensorrt",
}


def open_session(model: OnnxFile, providers: Sequence[str], threads: int | None) -> onnxruntime.InferenceSession:
    """A session of a checked model.

    Raises:
        BackendUnavailable: a provider that is not in this ONNX Runtime, or that did not start.
        FileError: ONNX Runtime refuses the model.
    """
    _require(providers, onnxruntime.get_available_providers(), "not in this build of ONNX Runtime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # what matters is raised
    if threads is not None:
        options.intra_op_num_threads = threads
    source = model.content if model.path is None else str(model.path)
    chosen = [(name, _options(name)) for name in providers]
    try:
        session = onnxruntime.InferenceSession(source, options, providers=chosen)
    except Exception as error:  # ONNX Runtime's errors share no other base
        raise FileError(f"{model.name}: ONNX Runtime refuses it: {error}") from error
    _require(providers, session.get_providers(), "could not be started; are its libraries installed?")
    return session


def _require(providers: Sequence[str], there: Sequence[str], problem: str) -> None:
    if not providers:
        raise BackendUnavailable(f"no provider given; {nearest('', there)}")
    for name in providers:
        if name not in there:
            raise BackendUnavailable(f"{name}: {problem}; {INSTALL.get(name) or nearest(name, there)}")


def _options(provider: str) -> dict[str, str]:
    if not torch.cuda.is_available() or provider not in INSTALL:
        return {}
    options = {"device_id": str(torch.cuda.current_device())}
    if provider == "TensorrtExecutionProvider":
        options["trt_sparsity_enable"] = "1"
    return options
