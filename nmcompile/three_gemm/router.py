"""The mode in which Python code multiplies by weights: its products run as layers, and other reads are told.

F.linear(x, self.qkv.weight)  ->  the three GEMMs of the layer "qkv"
F.linear(x, self.experts[i])  ->  those of the layer "experts", with its i-th matrix
self.qkv.weight.sum()         ->  a warning: it is the sum of the dense weight
"""

import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nmcompile.arguments import Args, Kwargs, tensors_in
from nmcompile.ir.element_reads import LIKE_SECOND, is_metadata
from nmcompile.ir.layers import LinearLayer
from nmcompile.ir.storage_key import storage_key
from nmcompile.ir.weight_products import COMPOSED, Function, Part, Product, part_of, products
from nmcompile.three_gemm.triple import GemmTriple, Matrix

Route = tuple[str, str]
"""The module that holds a layer, relative to the module with the code, and the layer's role in it."""
Layers = Sequence[tuple[Tensor, GemmTriple]]
"""Weights as the code sees them, with their layers."""
Method = Callable[..., object]
CHECKPOINT = "torch.utils.checkpoint"
ASIDE = ("nmcompile.", "torch.optim.", "copy.")
"""Modules whose functions may read a dense weight: a layer itself, an optimizer, a copy."""


def layers_at(module: nn.Module, routes: Mapping[str, Route]) -> Layers:
    """Return the weights as the code of a module sees them now, with their layers."""
    found = []
    for name, (path, role) in routes.items():
        owner, _, attribute = name.rpartition(".")
        weight: Tensor = getattr(module.get_submodule(owner), attribute)
        found.append((weight, cast(GemmTriple, module.get_submodule(path).__dict__["three_gemms"][role])))
    return found


def routing(method: Method, layers_of: Callable[[nn.Module], Layers], is_routed: bool = True) -> Method:
    """Return a method, with its signature, that runs in a router.

    Args:
        method: of a module's class.
        layers_of: gives the weights that the method may multiply by.
        is_routed: whether products run as layers; otherwise the router only warns.
    """

    @functools.wraps(method)
    def routed(self: nn.Module, *args: object, **kwargs: object) -> object:
        layers = layers_of(self)
        if not layers:
            return method(self, *args, **kwargs)
        router = Router(layers if is_routed else (), layers, method.__qualname__)
        with router:
            result = method(self, *args, **kwargs)
        if router.reads:
            router.tell()
        return result

    return routed


ROUTED = next(one for one in routing.__code__.co_consts if getattr(one, "co_name", "") == "routed")


class Router(TorchFunctionMode):
    """A mode in which products with weights run as layers; it warns if a pruned weight is read in another way.

    Args:
        routed: the weights whose products run as layers.
        watched: those whose other reads are told.
        code: the name of the code that runs.
    """

    def __init__(self, routed: Layers, watched: Layers, code: str) -> None:
        super().__init__()
        self.routed = routed
        self.watched = watched
        self.code = code
        self.reads: dict[str, tuple[str, GemmTriple]] = {}

    def __torch_function__(
        self, function: Function, types: Sequence[type], args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if opened := COMPOSED.get(function):
            with self:
                return opened(*args, **kwargs)
        found = products(function, args, kwargs)
        for product, (weight, triple) in itertools.product(found, self.routed) if found else ():
            part = part_of(weight, product)
            if part is not None and triple.is_dense:
                triple.note_call()  # the very function that eager code calls runs it
            elif part is not None and self._is_layer(triple, part, (args, kwargs)):
                with torch._C.DisableTorchFunction():  # Dynamo lets a layer's own products come here again
                    return _run(triple, weight, product, part)
        result = function(*args, **kwargs)
        # Dynamo knows no storages.
        if self.watched and not torch.compiler.is_dynamo_compiling() and self._is_given((*args, *kwargs.values())):
            self._note(function, args, kwargs, result)
        return result

    def _is_layer(self, triple: GemmTriple, part: Part, operands: object) -> bool:
        """Return whether a product with a part of a weight is the layer's, and not a product of two weights, say."""
        layer = triple.layer
        if not isinstance(layer, LinearLayer) or layer.transposed != part.is_stored_in_out:
            return False
        if torch.compiler.is_dynamo_compiling():
            return True
        # Backward would run activation checkpointing again, outside of any router.
        return len(self._weights(operands)) == 1 and CHECKPOINT not in _callers(sys._getframe(2))

    @functools.cached_property
    def _views(self) -> dict[int, Tensor]:
        """The weights, and what the code has made of them without a copy, by id."""
        return {id(weight): weight for weight, _ in self.watched}

    def _is_given(self, operands: Iterable[object]) -> bool:
        """Return whether operands may be parts of weights; each call of torch asks, so storages are not compared."""
        views = self._views
        return any(
            id(one) in views or id(one._base) in views
            if isinstance(one, Tensor)
            else isinstance(one, tuple | list) and self._is_given(one)
            for one in operands
        )

    @functools.cached_property
    def _places(self) -> list[tuple[int, int, int, GemmTriple]]:
        """The storage, the offset and the size of each weight, with its layer."""
        return [(storage_key(one), int(one.storage_offset()), one.numel(), triple) for one, triple in self.watched]

    def _weights(self, operands: object) -> list[GemmTriple]:
        """Return the layers of the weights that operands are, or are parts of, once for each operand."""
        tensors = [(storage_key(one), one) for one in tensors_in(operands)]
        return [
            triple
            for key, offset, size, triple in self._places
            for storage, one in tensors
            if key == storage and 0 <= one.storage_offset() - offset < size
        ]

    def _note(self, function: Function, args: Args, kwargs: Kwargs, result: object) -> None:
        """Note an operator that took elements of a pruned weight, and what one made of it without a copy."""
        name, made = getattr(function, "__name__", str(function)), list(tensors_in(result))
        if self._weights(made):
            self._views.update({id(one): one for one in made})
            return
        writes = bool(args) and result is args[0]
        if not made or writes or name == "__get__" or is_metadata(name):
            return
        read = self._weights(args[:1] if name in LIKE_SECOND else (args, kwargs))
        pruned = [one for one in read if one.mask is not None or one.steps.weight_grid is not None]
        if pruned and not any(map(_is_aside, _callers(sys._getframe(2)))):
            self.reads.update((one.layer.name, (name, one)) for one in pruned)

    def tell(self) -> None:
        """Warn of reads; a forward without routes reads the very weight of a layer that nobody calls."""
        for layer, (function, triple) in self.reads.items():
            if self.routed or triple.called:
                warnings.warn(
                    f"{self.code} reads the weight of layer {layer!r} ({function}): it sees the dense weight, not the "
                    "pruned one that the layer multiplies by; call the layer, or pass args= to compile if forward "
                    f"reads it, or leave the layer dense with CompileConfig(layers={{{layer!r}: None}})",
                    stacklevel=3,
                )


def _callers(frame: FrameType | None) -> Iterator[str]:
    """Yield the modules whose code runs between a frame and the routed method, the innermost first."""
    while frame is not None and frame.f_code is not ROUTED:
        yield str(frame.f_globals.get("__name__"))
        frame = frame.f_back


def _is_aside(module: str) -> bool:
    return f"{module}.".startswith(ASIDE)


def _run(triple: GemmTriple, weight: Tensor, product: Product, part: Part) -> Tensor:
    """Run a layer on the operands of a product."""
    if weight.requires_grad and not product.weight.requires_grad and torch.is_grad_enabled():
        weight = weight.detach()  # a constant here
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
