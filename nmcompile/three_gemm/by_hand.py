"""Methods that may multiply by the weights of layers by hand, beside the forward that the compiler saw.

model(x)               the products in forward run as layers
model.encode_image(x)  so do those in other methods, such as `h @ self.proj`
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from nmcompile.three_gemm.router import Layers, Method, layers_at, routing

BY_HAND = "three_gemm_by_hand"
"""Attribute of a module: by the method's name, the routes of the weights that it may multiply by."""


def routed_methods(base: type[nn.Module], names: Iterable[str]) -> dict[str, Method]:
    """Return methods of a class as its compiled subclass has them.

    The products of a forward run as layers only if an example showed how it multiplies, or a graph; otherwise it is
    watched for reads of weights, in eager mode.
    """
    return {name: routing(getattr(base, name), partial(_layers, name), name != "forward") for name in names}


def _layers(name: str, module: nn.Module) -> Layers:
    if name == "forward" and torch.compiler.is_compiling():
        return ()
    return layers_at(module, module.__dict__[BY_HAND][name])
