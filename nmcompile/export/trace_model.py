"""nn.Module in eval mode -> ONNX graph of the operators that its forward calls, nothing folded or renamed yet."""

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nmcompile.errors import ExportError
from nmcompile.export.runners import first_line
from nmcompile.ir.einsum import linear_einsum

OPSET = 21  # the first with 4-bit integers
BATCH = "batch"


def trace_model(
    plain: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, dtype: torch.dtype, dynamic_batch: bool
) -> ir.Model:
    """Trace the model; initializers keep the names of parameters and buffers.

    Args:
        plain: in eval mode; not changed.
        args, kwargs: an example of the inputs.
        dtype: of the graph; a copy of the model and the inputs are cast for float16, and where parameters are float64.
        dynamic_batch: leave dim 0 of every input that has the first input's batch size open.

    Raises:
        ExportError: a model in train mode, one that torch.export cannot trace, one that does not take such inputs or
            returns a constant, or an operator without ONNX form.
    """
    _check_eval(plain)
    # Runtimes have no kernels for most operators in float64.
    if dtype != torch.float32 or any(parameter.dtype == torch.float64 for parameter in plain.parameters()):
        plain = copy.deepcopy(plain).to(dtype)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs)
        )
    shapes = None
    if dynamic_batch:
        args, kwargs = _two_samples(args, kwargs)
        shapes = _open_batch(plain, args, kwargs)
    program = _exported(plain, args, kwargs, shapes)
    _check_outputs(program, type(plain).__name__)
    _open_einsums(program)
    try:
        with _without_advice():
            traced = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"the model has an operator without ONNX form: {_innermost(error)}") from error
    assert traced is not None
    return traced.model


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence what the exporter says of torch's own code, and of a torchvision that is not installed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(_is_about_the_model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.removeFilter(_is_about_the_model)


def _is_about_the_model(record: logging.LogRecord) -> bool:
    return "torchvision is not installed" not in record.getMessage()


def _check_eval(plain: nn.Module) -> None:
    name = next((name for name, module in plain.named_modules() if module.training), None)
    if name is not None:
        where = f"module {name!r}" if name else type(plain).__name__
        raise ExportError(f"{where} is in train mode; call model.eval() before the export")


def _check_outputs(program: torch.export.ExportedProgram, model: str) -> None:
    for number, output in enumerate(program.graph_signature.output_specs, start=1):
        constant = getattr(output.arg, "value", None)
        if constant is not None:
            raise ExportError(
                f"{model} returns the constant {constant!r} as output {number}, and a file's outputs are tensors; "
                f"leave it out, or return torch.tensor({constant!r})"
            )


def _exported(
    plain: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: Any
) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(plain, args, dict(kwargs), dynamic_shapes=shapes)
    except Exception as error:  # whatever the model's own code raises comes out here
        hint = "; if it needs one batch size, give dynamic_batch=False" if shapes is not None else ""
        raise ExportError(f"torch.export cannot trace {type(plain).__name__}: {first_line(error)}{hint}") from error


def _open_einsums(program: torch.export.ExportedProgram) -> None:
    """Write each einsum that is a linear layer as linear or matmul, in place: runtimes have no sparse Einsum."""
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.einsum.default or len(node.args[1]) != 2:
            continue
        equation, operands = node.args[:2]
        weight = next((i for i in (1, 0) if operands[i].name in program.graph_signature.inputs_to_parameters), None)
        is_out_in = None if weight is None else linear_einsum(equation, weight)
        if weight is not None and is_out_in is not None:
            node.target = torch.ops.aten.linear.default if is_out_in else torch.ops.aten.matmul.default
            node.args = operands[1 - weight], operands[weight]
    program.graph_module.recompile()


def _batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    tensors = [x for x in pytree.tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor) and x.dim()]
    return tensors[0].shape[0] if tensors else None


def _two_samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The example with a batch of two where it has one: torch.export takes a size of 1 for a constant."""
    if _batch_of(args, kwargs) != 1:
        return args, kwargs

    def twice(x: Tensor) -> Tensor:
        return torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x

    doubled: tuple[tuple[Any, ...], Mapping[str, Any]] = pytree.tree_map_only(Tensor, twice, (args, dict(kwargs)))
    return doubled


def _open_batch(plain: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`dynamic_shapes` by the names of forward's arguments."""
    size, batch = _batch_of(args, kwargs), torch.export.Dim(BATCH)
    try:
        arguments = inspect.signature(plain.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise ExportError(f"{type(plain).__name__} does not take these args and kwargs: {error}") from error

    def opened(x: Any) -> dict[int, Any] | None:
        return {0: batch} if isinstance(x, Tensor) and x.dim() and x.shape[0] == size else None

    return pytree.tree_map(opened, dict(arguments))


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
