"""The weight of a functional call: a parameter, or an expression of parameters and buffers only."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize

from nmcompile.capture.clones import fake_clone
from nmcompile.capture.names import join
from nmcompile.capture.sites import is_layer
from nmcompile.ir.calls import Call
from nmcompile.ir.expression import expression_of, value_of


@dataclass(frozen=True)
class Weight:
    """The weight of a call.

    Args:
        names: the parameters that it is computed from, relative to the module.
        parameters: their ids.
        shape: the shape of the weight passed to the call.
        is_expression: whether it is not the parameter itself.
        refusal: why the call cannot be a layer, or "".
        attribute: holds the weight, as a parameter or as the result of a parametrization or a hook; "" if none does.
    """

    names: tuple[str, ...]
    parameters: frozenset[int]
    shape: tuple[int, ...]
    is_expression: bool
    refusal: str = ""
    attribute: str = ""


def find_weight(module: nn.Module, call: Call, measure: bool = True) -> Iterator[Weight]:
    """Yield the call's weight, or nothing if it depends on activations.

    `measure=False` omits the shape.
    """
    weight = weight_at(module, call.weight, measure) if isinstance(call.weight, fx.Node) else None
    if weight is None:
        return
    if measure and not weight.refusal and len(weight.shape) not in call.ranks:
        weight = replace(weight, refusal=f"its weight has {len(weight.shape)} dims")
    yield weight


def parameters_behind(module: nn.Module, call: Call) -> frozenset[int]:
    """Return the ids of the parameters that a call's weight is computed from; none if it depends on activations."""
    return next((weight.parameters for weight in find_weight(module, call, measure=False)), frozenset())


def weight_at(module: nn.Module, node: fx.Node, measure: bool = True) -> Weight | None:
    """Return a node's value as a weight, or None if it depends on activations.

    `measure=False` omits the shape.
    """
    expression = expression_of(node)
    named = dict(item for one in expression for item in _parameters_of(module, one))
    if not all(_is_constant(module, one) for one in expression):
        return None
    if measure:
        return _weight(module, expression, named)
    return Weight(tuple(named), frozenset(map(id, named.values())), (), _is_expression(module, node))


def matrix_dims(module: nn.Module, node: fx.Node) -> int | None:
    """Return the number of dims of a weight; None for activations, results of layers, and without a parameter."""
    called = [one for one in expression_of(node) if one.op == "call_module"]
    if any(is_layer(m) for one in called for m in module.get_submodule(str(one.target)).modules()):
        return None
    weight = weight_at(module, node)
    return len(weight.shape) if weight is not None and weight.names else None


def adds_bias(module: nn.Module, call: Call, width: int) -> bool:
    """Return whether the call adds a vector with one element per output, and not a matrix as `addmm` may."""
    bias = call.arguments.get("bias")
    if call.function != "addmm" or not isinstance(bias, fx.Node):
        return True
    found = read_attribute(module, str(bias.target)) if bias.op == "get_attr" else weight_at(module, bias)
    return tuple(getattr(found, "shape", ())) == (width,)


def _weight(module: nn.Module, expression: list[fx.Node], named: dict[str, Tensor]) -> Weight:
    names, ids = tuple(named), frozenset(id(tensor) for tensor in named.values())
    is_expression = _is_expression(module, expression[-1])
    if not named:
        return Weight((), ids, (), is_expression, "its weight is neither a parameter nor computed from one")
    try:
        tensor = _fake_value(module, expression[-1]) if is_expression else next(iter(named.values()))
    except Exception as error:
        reason = f"the shape of its computed weight is unknown ({type(error).__name__})"
        return Weight(names, ids, (), is_expression, reason)
    refusal = "" if tensor.is_floating_point() else f"its weight is {str(tensor.dtype).removeprefix('torch.')}"
    return Weight(names, ids, tuple(tensor.shape), is_expression, refusal, _attribute(module, expression[-1]))


def _is_expression(module: nn.Module, node: fx.Node) -> bool:
    """Return whether a node is not a stored tensor; the result of a hook is stored only during a call."""
    return node.op != "get_attr" or bool(_hooked_parameters(module, str(node.target)))


def _attribute(module: nn.Module, node: fx.Node) -> str:
    target = str(node.target)
    if node.op == "call_module" and isinstance(module.get_submodule(target), parametrize.ParametrizationList):
        owner, _, name = target.rpartition(".")
        return join(owner.removesuffix("parametrizations").removesuffix("."), name)
    return target if node.op == "get_attr" else ""


def _hooked_parameters(module: nn.Module, target: str) -> list[tuple[str, Tensor]]:
    """Return the parameters from which a hook computes an attribute: `weight_g` and `weight_v`, `weight_orig`."""
    path, _, name = target.rpartition(".")
    owner = module.get_submodule(path)
    if name not in owner.__dict__ or not owner._forward_pre_hooks:
        return []
    named = owner.named_parameters(recurse=False)
    return [(join(path, one), tensor) for one, tensor in named if one.startswith(f"{name}_")]


def read_attribute(module: nn.Module, target: str) -> object:
    """Return the value of a get_attr node, without running properties such as a parametrized weight."""
    path, _, name = target.rpartition(".")
    owner = module.get_submodule(path)
    for table in (owner._parameters, owner._buffers, owner._modules, owner.__dict__):
        if name in table:
            return table[name]
    return None


def _parameters_of(module: nn.Module, node: fx.Node) -> list[tuple[str, Tensor]]:
    target = str(node.target)
    if node.op == "get_attr":
        value = read_attribute(module, target)
        return [(target, value)] if isinstance(value, nn.Parameter) else _hooked_parameters(module, target)
    if node.op == "call_module":
        return [(f"{target}.{name}", value) for name, value in module.get_submodule(target).named_parameters()]
    return []


def _is_constant(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "get_attr":
        return isinstance(read_attribute(module, str(node.target)), Tensor)
    return node.op != "placeholder"


def _fake_value(module: nn.Module, node: fx.Node) -> Tensor:
    """Return the value of an expression without data: no arithmetic, no random numbers, no change to a buffer."""
    reads = {str(one.target) for one in expression_of(node) if one.op == "get_attr"}
    # The result of a hook is not a leaf, which torch would warn about.
    stored = {name: _stored(module, name).detach() for name in reads}
    with FakeTensorMode() as mode:
        return value_of(
            node,
            attribute=lambda name: mode.from_tensor(stored[name]),
            submodule=lambda name: fake_clone(module.get_submodule(name), mode),
        )


def _stored(module: nn.Module, target: str) -> Tensor:
    value = read_attribute(module, target)
    assert isinstance(value, Tensor)
    return value
