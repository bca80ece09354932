"""Every backend calls the functions of its GEMMs with the same arguments, and none asks another for them."""

from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import pytest
import torch
from torch import fx, nn

import nmcompile
from nmcompile import CompileConfig, Phase
from nmcompile.backends.cpu import CpuBackend
from nmcompile.backends.cusparselt import CusparseltBackend
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.backends.reference.backend import GEMMS
from nmcompile.backends.shared.gemm_arguments import gemm_arguments
from nmcompile.ir import operations as ops
from nmcompile.ir.node_meta import meta_of
from nmcompile.ir.protocols import Backend, Support
from tests.backends.fake_cusparselt import FakeLibrary
from tests.conformance.gemms import LAYERS, assert_within_rounding, lowered_graphs, operands, run


@dataclass
class Noting:
    """A backend that notes the arguments of each GEMM and runs the reference's function."""

    name: str = "noting"
    seen: dict[Phase, tuple[Any, ...]] = field(default_factory=dict)

    def available(self) -> Support:
        return Support(True)

    def supports(self, node: fx.Node) -> Support:
        return Support(node.target in (ops.gemm_forward, ops.gemm_backward, ops.gemm_update))

    def lower(self, node: fx.Node) -> None:
        meta, target = meta_of(node), node.target
        arguments = self.seen[meta.phase] = gemm_arguments(node)
        function = GEMMS[target, type(meta.layer)]
        signature(function).bind(*arguments)
        ops.replace_node(node, function, arguments)


@pytest.mark.parametrize("name", LAYERS)
def test_they_are_those_of_the_reference(name: str) -> None:
    layer, shape = LAYERS[name]
    tensors, noting = operands(layer, shape), Noting()
    assert_within_rounding(layer, run(lowered_graphs(layer, noting), *tensors), tensors)
    names = {phase: [str(x) for x in found if isinstance(x, fx.Node)] for phase, found in noting.seen.items()}
    shapes = ([], []) if layer.kind == "linear" else (["input_1"], ["weight"])
    assert names == {
        Phase.FORWARD: ["input_1", "weight", *["bias"] * layer.has_bias],
        Phase.BACKWARD: ["grad_output", "weight", *shapes[0]],
        Phase.UPDATE: ["grad_output", "input_1", *shapes[1]],
    }


@pytest.mark.parametrize("backend", [CpuBackend(), CusparseltBackend(FakeLibrary())], ids=lambda backend: backend.name)
def test_no_backend_asks_the_reference_to_lower_a_gemm(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if not backend.available().ok:
        pytest.skip(backend.available().reason)

    def lower(_: ReferenceBackend, node: fx.Node) -> None:
        assert meta_of(node).kind != "gemm", "lowered twice"
        reference(ReferenceBackend(), node)

    reference = ReferenceBackend.lower
    monkeypatch.setattr(ReferenceBackend, "lower", lower)
    compiled = nmcompile.compile(nn.Linear(8, 8), "training", config=CompileConfig(ends="sparse"), backend=backend)
    compiled(torch.randn(4, 8)).sum().backward()
