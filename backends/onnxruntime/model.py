"""An exported ONNX file as a callable on torch tensors.

ONNX Runtime runs whole files. It is no `Backend` of the three graphs: it lowers no node, and `compile` never picks it.
"""

import os
from collections.abc import Mapping, Sequence

import onnxruntime
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from nmcompile.backends.onnxruntime.session import open_session
from nmcompile.backends.onnxruntime.values import Value, checked_inputs
from nmcompile.errors import LoweringError
from nmcompile.onnx_files import open_onnx


class OnnxRuntimeModel:
    """Runs an ONNX model. Tensors are bound, not copied: inputs where they are, outputs where ONNX Runtime puts them.

    Attributes:
        inputs: name, dtype and shape of each; a dimension given by a name may have any size, the same everywhere.
        outputs: likewise.
        device: where inputs have to be and outputs are.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> None:
        """Check the model as untrusted, and open a session on it.

        Args:
            model: a file or its bytes.
            providers: of ONNX Runtime, first choice first. With TensorRT its sparse tactics are on.
            threads: for one operator; None for one per core.

        Raises:
            FileError: a damaged or hostile file, or one that ONNX Runtime refuses.
            BackendUnavailable: a provider that this machine does not have; there is no silent fallback.
        """
        self.session = open_session(open_onnx(model), providers, threads)
        self.inputs = tuple(Value.of(argument) for argument in self.session.get_inputs())
        self.outputs = tuple(Value.of(argument) for argument in self.session.get_outputs())
        on_gpu = self.session.get_providers()[0] in ("CUDAExecutionProvider", "TensorrtExecutionProvider")
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the model.

        Args:
            args: the inputs in their order.
            kwargs: or by name.

        Returns:
            the output, or a tuple where there are several.

        Raises:
            OperandError: a missing or unknown input, or one of another dtype, shape or device.
            LoweringError: an operator failed.
        """
        tensors = checked_inputs(self.inputs, args, kwargs, self.device)
        results = self._run(tensors)
        return results[0] if len(results) == 1 else results

    def _run(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        binding = self.session.io_binding()
        device, index = self.device.type, self.device.index or 0
        for value in self.inputs:
            x = tensors[value.name]
            binding.bind_input(value.name, device, index, value.onnx_dtype, tuple(x.shape), x.data_ptr())
        for value in self.outputs:
            binding.bind_output(value.name, device, index)
        if device == "cuda":
            torch.cuda.current_stream().synchronize()  # ONNX Runtime computes in a stream of its own
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's errors share no other base
            raise LoweringError(f"ONNX Runtime could not run the model: {error}") from error
        binding.synchronize_outputs()
        return tuple(_shared(value, self.outputs[i]) for i, value in enumerate(binding.get_outputs()))


def _shared(value: onnxruntime.OrtValue, declared: Value) -> Tensor:
    """The result without a copy; torch keeps the memory alive."""
    return from_dlpack(value).view(declared.dtype)  # DLPack calls bool uint8
