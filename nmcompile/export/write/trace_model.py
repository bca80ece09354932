"""nn.Module in eval mode -> ONNX graph of the operators that its forward calls, nothing folded or renamed yet."""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.export.graph_signature import TensorArgument
from torch.utils import _pytree as pytree

from nmcompile.arguments import Args, Kwargs
from nmcompile.errors import ExportError
from nmcompile.export.outputs import left_out, output_names, outputs_of
from nmcompile.export.write.flatten_attention import flatten_attention
from nmcompile.export.write.open_products import open_products
from nmcompile.export.write.open_shapes import Shapes, enlarged, names_of, open_as_asked, open_batch
from nmcompile.own_thread import exporting_alone
from nmcompile.printable import first_line

OPSET = 21  # the first opset with 4-bit integers
FIXED = "if the model needs one size there, give dynamic_batch=False, or leave that dim out of dynamic_shapes"


@dataclass(frozen=True)
class Traced:
    """A graph, and the parts of the model that are not in it.

    Attributes:
        model: the graph.
        unread: parameters that no output is computed from, in eval mode and for these inputs.
        left_out: the results of forward that are not tensors, by place and class.
        outputs: the names of the outputs; "" for one that has none.
        ranges: the smallest and the largest size of each open dim, by name.
    """

    model: ir.Model
    unread: frozenset[str]
    left_out: tuple[str, ...]
    outputs: tuple[str, ...]
    ranges: Mapping[str, tuple[float, float]]


def trace_model(
    plain: nn.Module,
    args: Args,
    kwargs: Kwargs,
    *,
    dtype: torch.dtype,
    dynamic_batch: bool,
    dynamic_shapes: object = None,
) -> Traced:
    """Trace the model; initializers keep the names of parameters and buffers.

    Args:
        plain: in eval mode; not changed.
        args, kwargs: an example of the inputs.
        dtype: dtype of the graph; for float16, and for float64 parameters, a copy of model and inputs is cast.
        dynamic_batch: leave dim 0 of every input that has the first input's batch size open.
        dynamic_shapes: the dims to leave open instead, in torch.export's form.

    Raises:
        ConfigError: `dynamic_shapes` that do not fit the inputs.
        ExportError: a model in train mode, one that torch.export cannot trace, one that does not take such inputs or
            returns a constant or no tensor, or an operator without ONNX form.
    """
    _check_eval(plain)
    # Runtimes have no kernels for most operators in float64.
    if dtype != torch.float32 or any(parameter.dtype == torch.float64 for parameter in plain.parameters()):
        plain = copy.deepcopy(plain).to(dtype)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs)
        )
    shapes = None
    if dynamic_shapes is not None:
        shapes = open_as_asked(plain, args, kwargs, dynamic_shapes)
    elif dynamic_batch:
        shapes = open_batch(plain, args, kwargs)
    if shapes is not None:
        args, kwargs = enlarged(plain, args, kwargs, shapes)
    program, left, outputs = _exported(plain, args, kwargs, shapes)
    _check_outputs(program, type(plain).__name__)
    open_products(program)
    flatten_attention(program)
    try:
        # With gradients on, the decomposition of attention would take a kernel with other strides than the trace.
        with exporting_alone(), torch.no_grad(), _without_advice():
            traced = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"the model has an operator without ONNX form: {_innermost(error)}") from error
    assert traced is not None
    if shapes is not None:
        # The exporter renames open sizes itself only if every argument is a tensor.
        dims = [value.shape or () for value in traced.model.graph.inputs]
        traced.rename_axes(names_of(plain, args, kwargs, shapes, dims))
    return Traced(traced.model, _unread(program), left, outputs, _ranges(program, shapes))


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence the exporter's messages about torch's own code, and about a torchvision that is not installed."""
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
    specs = program.graph_signature.output_specs
    if not any(isinstance(spec.arg, TensorArgument) for spec in specs):
        raise ExportError(f"{model} returns no tensor, and a file's outputs are tensors")
    for number, output in enumerate(specs, start=1):
        constant = getattr(output.arg, "value", None)
        if constant is not None:
            raise ExportError(
                f"{model} returns the constant {constant!r} as output {number}, and a file's outputs are tensors; "
                f"leave it out, or return torch.tensor({constant!r})"
            )


def _exported(
    plain: nn.Module, args: Args, kwargs: Kwargs, shapes: Shapes | None
) -> tuple[torch.export.ExportedProgram, tuple[str, ...], tuple[str, ...]]:
    """Return the program that returns only tensors, the results that it leaves out, and the names of the others."""
    left, names = list[str](), list[str]()

    def tensors_only(module: nn.Module, args: object, result: object) -> list[object]:
        left[:], names[:] = left_out(result), output_names(result)
        return outputs_of(result)

    hook = plain.register_forward_hook(tensors_only)
    try:
        with exporting_alone(), torch.no_grad():
            program = torch.export.export(plain, args, dict(kwargs), dynamic_shapes=shapes)
            return program, tuple(left), tuple(names)
    except Exception as error:  # anything that the model's own code raises
        hint = "" if shapes is None else f"; {FIXED}"
        raise ExportError(f"torch.export cannot trace {type(plain).__name__}: {_explained(error)}{hint}") from error
    finally:
        hook.remove()


def _explained(error: Exception) -> str:
    """Return the first line of an error, with torch's suggestions on how to open sizes if there are any."""
    _, _, fixes = str(error).partition("Suggested fixes:")
    lines = [line.strip() for line in fixes.strip().splitlines()]
    suggested = [line for line in lines[: lines.index("") if "" in lines else None] if line]
    return first_line(error) + (f" (suggested: {'; '.join(suggested)})" if suggested else "")


def _unread(program: torch.export.ExportedProgram) -> frozenset[str]:
    read = {program.graph.output_node()}
    for node in reversed(program.graph.nodes):
        read.update(node.all_input_nodes if node in read else ())
    names = {node.name for node in read}
    return frozenset(name for node, name in program.graph_signature.inputs_to_parameters.items() if node not in names)


def _ranges(program: torch.export.ExportedProgram, shapes: Shapes | None) -> dict[str, tuple[float, float]]:
    found = {str(size): (float(range.lower), float(range.upper)) for size, range in program.range_constraints.items()}
    dims = [dim for dim in pytree.tree_leaves(shapes) if isinstance(dim, Dim)]
    return found | {dim.__name__: (float(dim.min), float(dim.max)) for dim in dims}


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
