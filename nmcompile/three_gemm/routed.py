"""Modules whose own Python code multiplies by weights: the code runs as it is, and its products run as layers.

F.linear(x, self.qkv.weight)  ->  the three GEMMs of the layer "qkv"
F.linear(x, self.experts[i])  ->  those of the layer "experts", with its i-th matrix
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nmcompile.arguments import Args, Kwargs
from nmcompile.ir.weight_products import Function, Part, Product, part_of, products
from nmcompile.three_gemm.modules import ThreeGemm, install
from nmcompile.three_gemm.triple import GemmTriple, Matrix

Route = tuple[str, str]
"""The module that holds a layer, relative to the module with the code, and the layer's role in it."""


class ThreeGemmRouted(ThreeGemm):
    """A module that keeps its forward; `three_gemm_routes` names the layers of the weights that its code multiplies by.

    Its own parameters are layers with their attribute as role.
    """

    three_gemm_routes: Mapping[str, Route]
    forward: Callable[..., object]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        *_, own = cls.__bases__
        if not issubclass(own, ThreeGemm):
            cls.forward = _routing(cast(type[nn.Module], own).forward)


class ThreeGemmUntraced(ThreeGemmRouted):
    """One whose code Dynamo breaks off in: it finds no matrix of a stack, and fails in a mode after a graph break."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.forward = torch.compiler.disable(cls.forward)


def _routing(forward: Callable[..., object]) -> Callable[..., object]:
    """Return a forward, with its signature, whose products with weights run as layers."""

    @functools.wraps(forward)
    def routed(self: ThreeGemmRouted, *args: object, **kwargs: object) -> object:
        with Router(_layers(cast(nn.Module, self), self.three_gemm_routes)):
            return forward(self, *args, **kwargs)

    return routed


def install_routes(
    module: nn.Module, routes: Mapping[str, Route], triples: dict[str, GemmTriple], is_traced: bool
) -> None:
    """Make products in the code of `module` run as layers.

    Args:
        module: receives the layers of its own parameters.
        routes: by the weight's name in the module.
        triples: by role.
        is_traced: whether `torch.compile` takes the code whole.
    """
    module.__dict__["three_gemm_routes"] = routes
    install(module, ThreeGemmRouted if is_traced else ThreeGemmUntraced, triples)


def _layers(module: nn.Module, routes: Mapping[str, Route]) -> list[tuple[Tensor, GemmTriple]]:
    """Return the weights as the code sees them now, with their layers."""
    found = []
    for name, (path, role) in routes.items():
        owner, _, attribute = name.rpartition(".")
        weight: Tensor = getattr(module.get_submodule(owner), attribute)
        found.append((weight, cast(ThreeGemm, module.get_submodule(path)).three_gemms[role]))
    return found


class Router(TorchFunctionMode):
    """A mode in which products with weights run as layers.

    Args:
        layers: the weights, with their layers.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, GemmTriple]]) -> None:
        super().__init__()
        self.layers = layers

    def __torch_function__(
        self, function: Function, types: Sequence[type], args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        found = products(function, args, kwargs)
        for product, (weight, triple) in itertools.product(found, self.layers) if found else ():
            part = part_of(weight, product)
            if part is not None and triple.is_dense:
                triple.note_call()  # the very function that eager code calls runs it
            elif part is not None:
                is_constant = weight.requires_grad and not product.weight.requires_grad and torch.is_grad_enabled()
                # Dynamo lets a layer's own products come here again.
                layers, self.layers = self.layers, ()
                try:
                    return _run(triple, weight.detach() if is_constant else weight, product, part)
                finally:
                    self.layers = layers
        return function(*args, **kwargs)


def _run(triple: GemmTriple, weight: Tensor, product: Product, part: Part) -> Tensor:
    """Run a layer on the operands of a product."""
    if weight.dim() == 3 and part.index is None:
        return _run_all(triple, weight, product)
    (input,), bias, has_bias = product.inputs(), product.bias, triple.layer.has_bias
    if has_bias and bias is None:
        bias = input.new_zeros(triple.layer.out_features)
    rows = None if part.index is None else Matrix(part.index, _stored(product, part))
    output = product.join([triple(input, weight, bias if has_bias else None, rows)])
    if rows is not None:
        triple.positions = None  # those of the other matrices are not known
    return output if bias is None or has_bias else output + bias.to(output.dtype)


def _run_all(triple: GemmTriple, weight: Tensor, product: Product) -> Tensor:
    """Run every matrix of a stack on its input, but those without any; one runs in any case, for gradients and type."""
    inputs, matrices = product.inputs(), weight.unbind(0)
    taken = [index for index, x in enumerate(inputs) if x.numel()] or [0]
    outputs = {index: triple(inputs[index], weight, None, Matrix(index, matrices[index])) for index in taken}
    triple.positions = sum(output.numel() for output in outputs.values()) // triple.layer.out_features
    first, width = outputs[taken[0]], triple.layer.out_features
    return product.join(
        [outputs[i] if i in outputs else first.new_zeros(*x.shape[:-1], width) for i, x in enumerate(inputs)]
    )


def _stored(product: Product, part: Part) -> Tensor:
    """Return a matrix as its parameter stores it."""
    is_turned = product.is_out_first == part.is_stored_in_out
    return product.weight.transpose(-2, -1) if is_turned else product.weight
