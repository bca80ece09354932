"""Model-local functions of standard operators, and calls of them. All have the domain of this package.

    f_Channels(x, ...)  =  Transpose(f(Transpose(x), ...))

ONNX Runtime's integer convolutions work channels-last, and the Transposes before and after them cancel these. A native
operator can have the domain and name of f (see nmcompile.onnxruntime.register): ONNX Runtime then runs it, and not the
function.
"""

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from nmcompile.export.write.build_nodes import insert_before
from nmcompile.export.write.trace_model import OPSET

DOMAIN = "nmcompile"


def add_function(
    model: ir.Model, operator: str, body: Sequence[str], inputs: Sequence[str] = ("x",), attributes: Sequence[str] = ()
) -> None:
    """Add a function with one output, y, unless the model has it."""
    key = (DOMAIN, operator, "")
    if key in model.functions:
        return
    header = f'<opset_import: ["" : {OPSET}, "{DOMAIN}" : 1], domain: "{DOMAIN}">'
    named = f" <{', '.join(attributes)}>" if attributes else ""
    text = "\n".join([header, f"{operator}{named} ({', '.join(inputs)}) => (y)", "{", *body, "}"])
    model.functions[key] = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    model.opset_imports[DOMAIN] = 1


def call_function(
    node: ir.Node, operator: str, inputs: Sequence[ir.Value], name: str, attributes: Sequence[ir.Attr] = ()
) -> ir.Value:
    """Call a function before a node; the result has the shape and type of the first input."""
    result = insert_before(node, operator, inputs, name, domain=DOMAIN, attributes=attributes)
    result.shape, result.type = inputs[0].shape, inputs[0].type
    return result


def call_channels_last(
    model: ir.Model, node: ir.Node, operator: tuple[str, str], inputs: dict[str, ir.Value], name: str
) -> ir.Value:
    """Call the first of two functions before a node, between Transposes; the second has the name of all three."""
    inner, outer = operator
    first, *others = inputs
    body = [
        f"before = Transpose <perm: ints = @last> ({first})",
        f"after = {DOMAIN}.{inner} ({', '.join(['before', *others])})",
        "y = Transpose <perm: ints = @first> (after)",
    ]
    add_function(model, outer, body, list(inputs), ("last", "first"))
    shape = inputs[first].shape
    assert shape is not None  # every activation of a convolution has a known rank
    last, back = [0, *range(2, len(shape)), 1], [0, len(shape) - 1, *range(1, len(shape) - 1)]
    orders = [ir.AttrInt64s("last", last), ir.AttrInt64s("first", back)]
    return call_function(node, outer, list(inputs.values()), name, orders)
