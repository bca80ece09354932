"""Sessions that run on the requested provider only."""

from collections.abc import Mapping, Sequence

import onnxruntime
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from nmcompile.backends.onnxruntime.custom_operators import register
from nmcompile.backends.onnxruntime.values import Value
from nmcompile.errors import BackendUnavailable, FileError, LoweringError, nearest
from nmcompile.files.open_onnx import OnnxFile

INSTALL = {
    "CUDAExecutionProvider": "pip install onnxruntime-gpu",
    "TensorrtExecutionProvider": "pip install onnxruntime-gpu tensorrt",
}


class Session:
    """A session in this process. Tensors are bound, not copied: inputs in place, outputs where ONNX Runtime puts them.

    Attributes:
        inputs, outputs: as ONNX Runtime describes them.
        device: device of the inputs and the outputs.
    """

    def __init__(self, model: OnnxFile, providers: Sequence[str], threads: int | None, native: bool) -> None:
        self._session = _open(model, providers, threads, native)
        self.inputs = tuple(Value.of(argument) for argument in self._session.get_inputs())
        self.outputs = tuple(Value.of(argument) for argument in self._session.get_outputs())
        on_gpu = self._session.get_providers()[0] in INSTALL
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def run(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Run the model on contiguous tensors.

        Raises:
            LoweringError: an operator failed.
        """
        if self._session is None:
            raise LoweringError("the model is closed; open it again")
        binding = self._session.io_binding()
        device, index = self.device.type, self.device.index or 0
        for value in self.inputs:
            x = tensors[value.name]
            binding.bind_input(value.name, device, index, value.onnx_dtype, tuple(x.shape), x.data_ptr())
        for value in self.outputs:
            binding.bind_output(value.name, device, index)
        if device == "cuda":
            torch.cuda.current_stream().synchronize()  # ONNX Runtime computes in its own stream
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's errors share no other base
            raise LoweringError(f"ONNX Runtime could not run the model: {error}") from error
        binding.synchronize_outputs()
        return tuple(_shared(value, self.outputs[i]) for i, value in enumerate(binding.get_outputs()))

    def close(self) -> None:
        """Release the session and its memory."""
        self._session = None


def _shared(value: onnxruntime.OrtValue, declared: Value) -> Tensor:
    """Return the result without a copy; torch keeps its memory alive."""
    return from_dlpack(value).view(declared.dtype)  # DLPack has bool as uint8


def _open(model: OnnxFile, providers: Sequence[str], threads: int | None, native: bool) -> onnxruntime.InferenceSession:
    """Open a session of a checked model, with native operators if wanted.

    Raises:
        BackendUnavailable: a provider that is not in this ONNX Runtime, or that did not start.
        FileError: ONNX Runtime refuses the model.
    """
    _require(providers, onnxruntime.get_available_providers(), "not in this build of ONNX Runtime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors are raised anyway
    if threads is not None:
        options.intra_op_num_threads = threads
    if native:
        register(options)
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
