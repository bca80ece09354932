"""A backend of your own: it multiplies in float64, and so shows how much of an error is rounding.

python examples/plug_in_backend.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

import nmcompile
from nmcompile.ir import operations
from nmcompile.ir.node_meta import meta_of
from nmcompile.ir.protocols import OTHER_KIND, Support


def exact_forward(input: Tensor, weight: Tensor) -> Tensor:
    return (input.double() @ weight.double().mT).to(input.dtype)


def exact_backward(grad_output: Tensor, weight: Tensor) -> Tensor:
    return (grad_output.double() @ weight.double()).to(grad_output.dtype)


KERNELS = {operations.gemm_forward: exact_forward, operations.gemm_backward: exact_backward}


@dataclass(frozen=True)
class ExactBackend:
    """Forward and backward GEMMs of linear layers in float64; everything else goes to the reference backend."""

    name: str = "exact"

    def available(self) -> Support:
        return Support(True, "float64 is everywhere")

    def supports(self, node: fx.Node) -> Support:
        if node.target not in KERNELS:
            return OTHER_KIND
        layer = meta_of(node).layer
        fits = layer.kind == "linear" and not layer.transposed
        return Support(fits, "" if fits else "only linear layers are multiplied in float64")

    def lower(self, node: fx.Node) -> None:
        operations.replace_node(node, KERNELS[node.target], node.args[:2])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.Tanh())])


if __name__ == "__main__":
    x = torch.randn(64, 256)
    config = nmcompile.CompileConfig(ends="sparse")
    exact = nmcompile.compile(network(), "t-weights", args=(x,), config=config, backend=ExactBackend())
    usual = nmcompile.compile(network(), "t-weights", args=(x,), config=config)
    for model in (exact, usual):
        model(x).square().sum().backward()
    kernels = nmcompile.inspect(exact).layer("2").kernels
    print({phase.value: kernel for phase, kernel in kernels.items()})
    assert "gemm: exact" in kernels[nmcompile.Phase.FORWARD] and "gemm: exact" in kernels[nmcompile.Phase.BACKWARD]

    pairs = zip(exact.parameters(), usual.parameters(), strict=True)
    error = max(((a.grad - b.grad).norm() / a.grad.norm()).item() for a, b in pairs)
    print(f"rounding in float32 moves a gradient by {error:.1e} of its norm at most")
    assert error < 1e-4
