"""The backends that the conformance tests run, each on a device and in a type that it takes."""

import importlib
import importlib.util
from dataclasses import dataclass

import pytest
import torch

from nmcompile.backends.cpu import CpuBackend
from nmcompile.backends.cusparselt import CusparseltBackend
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.backends.triton import TritonBackend
from nmcompile.config import Phase
from nmcompile.ir.choice import Choice
from nmcompile.ir.layers import ConvLayer, Layer
from nmcompile.ir.program import ThreeGraphs
from nmcompile.ir.protocols import Backend
from tests.backends.fake_cusparselt import FakeLibrary
from tests.backends.on_triton import HAS_DEVICE, interpreter

IS_INTERPRETED = importlib.util.find_spec("triton") is not None and not HAS_DEVICE
if IS_INTERPRETED:  # the interpreter must be requested before anything imports Triton
    with interpreter():
        importlib.import_module("nmcompile.backends.triton.kernels.blocks")


@dataclass(frozen=True)
class Case:
    """A backend, and the operands to give it."""

    backend: Backend
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> "Case":
        """Let sparse kernels run even if they gain nothing; skip the test if the backend cannot run."""
        if IS_INTERPRETED and self.backend.name == "triton":
            monkeypatch.setenv("TRITON_INTERPRET", "1")
        else:
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        support = self.backend.available()
        if not support.ok:
            pytest.skip(support.reason)
        if self.device == "cuda":  # the bounds are those of sums in float32
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
            monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
        monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
        return self

    def check_kernels(self, layer: Layer, graphs: ThreeGraphs) -> None:
        """Check that the backend ran all that it takes."""
        taken = {"cpu": tuple(Phase), "cusparselt": phases_of_cusparselt(layer)}.get(self.backend.name, ())
        chosen = {phase: choice.kernel for phase, choice in graphs.choices().items()}
        assert chosen == dict.fromkeys(taken, "sparse")
        pruning = {meta.backend for meta in graphs.metas(Phase.UPDATE) if meta.kind == "prune"}
        assert self.backend.name != "triton" or pruning == {"triton"}


def phases_of_cusparselt(layer: Layer) -> tuple[Phase, ...]:
    """Return the phases whose GEMM cuSPARSELt takes."""
    if not isinstance(layer, ConvLayer):
        return tuple(Phase)
    is_pointwise = {*layer.weight_shape[2:], *layer.stride} == {1}
    return (Phase.FORWARD, Phase.BACKWARD) if is_pointwise else ()


CASES = {
    "reference": Case(ReferenceBackend()),
    "cpu": Case(CpuBackend()),
    "triton": Case(TritonBackend(), "cuda" if HAS_DEVICE else "cpu"),
    "cusparselt": Case(CusparseltBackend(), "cuda", torch.bfloat16),
    "cusparselt in PyTorch": Case(CusparseltBackend(FakeLibrary())),
    "cusparselt in PyTorch, bfloat16": Case(CusparseltBackend(FakeLibrary()), dtype=torch.bfloat16),
}
NUMPY = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
"""Triton's interpreter computes with numpy, which warns about arithmetic that the reference does silently."""


def parameters() -> list[object]:
    """Return the cases as parameters of a fixture."""
    marks = {"triton": [NUMPY], "cusparselt": [pytest.mark.gpu]}
    return [pytest.param(case, id=name, marks=marks.get(name, [])) for name, case in CASES.items()]
