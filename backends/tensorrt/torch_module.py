"""TensorRT inside PyTorch, through Torch-TensorRT: unsupported operators run in PyTorch, and no ONNX file is made."""

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from nmcompile.errors import BackendUnavailable


def torch_tensorrt_module(model: nn.Module | ExportedProgram, args: Sequence[Tensor], **settings: object) -> nn.Module:
    """Compile a model with Torch-TensorRT, with sparse tactics on (there they are off by default).

    Args:
        model: with weights that really are 2:4, such as `nmcompile.finalize(compiled)`, in `eval()`; or exported.
        args: example inputs on the GPU.
        settings: settings of `torch_tensorrt.dynamo.compile`.

    Raises:
        BackendUnavailable: Torch-TensorRT cannot be imported.
    """
    try:
        dynamo = importlib.import_module("torch_tensorrt").dynamo
    except (ImportError, OSError) as error:
        raise BackendUnavailable(f"Torch-TensorRT cannot be imported ({error}); pip install torch-tensorrt") from error
    program = model if isinstance(model, ExportedProgram) else torch.export.export(model, tuple(args))
    compiled: nn.Module = dynamo.compile(program, tuple(args), sparse_weights=True, **settings)
    return compiled
