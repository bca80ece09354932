"""Modules whose own Python code multiplies by weights: the code runs as it is, and its products run as layers."""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn

from nmcompile.three_gemm.modules import ThreeGemm, install
from nmcompile.three_gemm.router import Layers, Route, layers_at, routing
from nmcompile.three_gemm.triple import GemmTriple


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
            cls.forward = routing(cast(type[nn.Module], own).forward, _routed_layers)


class ThreeGemmUntraced(ThreeGemmRouted):
    """One whose code Dynamo breaks off in: it finds no matrix of a stack, and fails in a mode after a graph break."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.forward = torch.compiler.disable(cls.forward)


def _routed_layers(module: nn.Module) -> Layers:
    return layers_at(module, module.__dict__["three_gemm_routes"])


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
