"""A plan as a callable on CUDA tensors."""

import os
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmcompile.backends.tensorrt.build_log import recorded
from nmcompile.backends.tensorrt.installed import find_tensorrt, gpu_name
from nmcompile.backends.tensorrt.sidecar import Sidecar, read_plan
from nmcompile.checks import check_path
from nmcompile.errors import BackendUnavailable, FileError, LoweringError, OperandError

if TYPE_CHECKING:
    import tensorrt

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


def load_engine(path: str | os.PathLike[str], sha256: str | None = None) -> "TensorRTModel":
    """Load a plan that `build_engine` wrote. A plan is native code: load only plans that you trust.

    Args:
        path: path of the plan; its sidecar lies beside it.
        sha256: hash of the plan, known from elsewhere, for a folder that others can write to.

    Raises:
        BackendUnavailable: no TensorRT or no GPU.
        FileError: plan and sidecar do not belong together, or another TensorRT or GPU is needed.
        LoweringError: TensorRT refuses the plan.
    """
    plan, sidecar = read_plan(check_path("path", path), sha256)
    trt = find_tensorrt()
    gpu = gpu_name()
    if gpu is None:
        raise BackendUnavailable(f"{path}: a TensorRT plan needs an NVIDIA GPU")
    _check_place(path, sidecar, trt, gpu)
    with recorded(trt) as (logger, log):
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise LoweringError(f"{path}: TensorRT refuses the plan: {log.last_troubles()}")
    return TensorRTModel(engine, trt)


def _check_place(path: str | os.PathLike[str], sidecar: Sidecar, trt: ModuleType, gpu: str) -> None:
    """Raise unless the plan was built for this TensorRT and this GPU."""
    built, here = f"{sidecar.flavour} {sidecar.version}", f"{trt.__name__} {trt.__version__}"
    if built != here:
        raise FileError(f"{path}: built by {built}, here is {here}; build it again")
    if sidecar.gpu not in (None, gpu):
        raise FileError(f"{path}: built for a {sidecar.gpu}, here is a {gpu}; build it again")


class TensorRTModel:
    """A loaded engine. It runs in torch's current stream, one call at a time; inputs come in the ONNX file's order."""

    def __init__(self, engine: "tensorrt.ICudaEngine", trt: ModuleType) -> None:
        self.engine = engine
        self.context = engine.create_execution_context()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]

    def __call__(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the engine.

        Raises:
            OperandError: another number of inputs, or one of another dtype, shape or device.
            LoweringError: TensorRT could not run it.
        """
        if len(args) != len(self.inputs):
            raise OperandError(f"{len(args)} inputs given; the engine takes {', '.join(self.inputs)}")
        held = [self._bind(name, tensor) for name, tensor in zip(self.inputs, args, strict=True)]
        results = tuple(self._allocate(name, held[0].device) for name in self.outputs)
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise LoweringError("TensorRT could not run the engine; its log has the reason")
        return results[0] if len(results) == 1 else results

    def _bind(self, name: str, tensor: Tensor) -> Tensor:
        """Bind an input; the returned tensor has to live until the call is queued."""
        dtype = DTYPES[self.engine.get_tensor_dtype(name).name]
        if tensor.device.type != "cuda" or tensor.dtype != dtype:
            raise OperandError(f"input {name!r}: expected {dtype} on cuda, got {tensor.dtype} on {tensor.device}")
        tensor = tensor.detach().contiguous()
        if not self.context.set_input_shape(name, tuple(tensor.shape)):
            least, _, most = self.engine.get_tensor_profile_shape(name, 0)
            raise OperandError(f"input {name!r}: shape {tuple(tensor.shape)} is not between {least} and {most}")
        self.context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _allocate(self, name: str, device: torch.device) -> Tensor:
        dtype = DTYPES[self.engine.get_tensor_dtype(name).name]
        result = torch.empty(tuple(self.context.get_tensor_shape(name)), dtype=dtype, device=device)
        self.context.set_tensor_address(name, result.data_ptr())
        return result
