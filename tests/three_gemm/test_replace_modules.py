"""Modules of a tree that are rewritten, how, and that they can be restored."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import nmcompile
from nmcompile import CompileConfig, ThreeGemm
from nmcompile.capture import capture_model
from nmcompile.config import preset
from nmcompile.errors import PreconditionError
from nmcompile.ir.program import Program
from nmcompile.planning.plan_phases import plan_phases
from nmcompile.three_gemm.attention import ThreeGemmAttention
from nmcompile.three_gemm.modules import ThreeGemmLayer, ThreeGemmRegion
from nmcompile.three_gemm.replace_modules import replace_modules

SPARSE = CompileConfig(ends="sparse")


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 4)


class Functional(nn.Module):
    """A module that calls `call` with its own parameters, and reads one of them elsewhere."""

    def __init__(self, call: Callable[[Tensor, Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.call, self.w, self.b, self.scale = call, parameter(*shape), parameter(8), parameter(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w, self.b).relu() * self.scale


class Noisy(Functional):
    """A module that draws in forward: a generated forward would freeze nothing, but a trace is not faithful."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y + torch.rand(y.shape) if self.training else y


class Opaque(nn.Module):
    """A module that is untraceable itself, unlike its children."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) if x.sum() > 0 else self.fc(-x)
        return y


CALLS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "F.linear": (F.linear, (8, 4), (3, 4)),
    "keywords": (lambda x, w, b: F.linear(input=x, bias=b, weight=w), (8, 4), (3, 4)),
    "without bias": (lambda x, w, b: F.linear(x, w) + b, (8, 4), (3, 4)),
    "torch.addmm": (lambda x, w, b: torch.addmm(b, x, w), (4, 8), (3, 4)),
    "F.conv1d": (lambda x, w, b: F.conv1d(x, w, b, 2, "valid"), (8, 4, 3), (2, 4, 9)),
    "F.conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=2), (8, 4, 3, 3), (2, 8, 5, 5)),
    "F.conv3d": (lambda x, w, b: F.conv3d(x, w, b, dilation=2), (8, 4, 2, 2, 2), (2, 4, 4, 4, 4)),
}


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output and every gradient."""
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    return [output, *torch.autograd.grad(output.square().sum(), [leaf, *model.parameters()])]


@pytest.mark.parametrize("name", CALLS)
def test_functional_calls_are_rewritten_and_compute_the_same(name: str) -> None:
    call, weight, input = CALLS[name]
    model = Functional(call, *weight)
    x = torch.randn(input)
    compiled = nmcompile.compile(model, "dense")
    assert isinstance(compiled, ThreeGemmRegion) and isinstance(compiled, Functional)
    assert [triple.layer.name for triple in compiled.three_gemms.values()] == ["w"]
    assert all(torch.equal(*pair) for pair in zip(results(compiled, x), results(model, x), strict=True))
    assert compiled.three_gemms.popitem()[1].called


@pytest.mark.parametrize("name", CALLS)
def test_functional_calls_are_pruned(name: str) -> None:
    call, weight, input = CALLS[name]
    model = Functional(call, *weight)
    compiled = nmcompile.compile(model, "weights", config=SPARSE)
    in_dim = 0 if name == "torch.addmm" else 1
    blocks = model.w.detach().movedim(in_dim, -1).unflatten(-1, (-1, 4))
    kept = torch.zeros_like(blocks).scatter(-1, blocks.abs().topk(2).indices, 1.0).flatten(-2).movedim(-1, in_dim)
    x = torch.randn(input)
    expected = call(x, model.w * kept, model.b).relu() * model.scale
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)


def test_a_forward_that_cannot_be_generated_faithfully_stays_python() -> None:
    model = nn.Sequential(Noisy(F.linear, 8, 8), nn.Linear(8, 8))
    compiled = nmcompile.compile(model, "training", config=SPARSE)
    assert type(compiled.get_submodule("0")) is Noisy
    assert isinstance(compiled.get_submodule("1"), ThreeGemmLayer)
    assert "0" in capture_model(model).python


def test_children_of_what_cannot_be_traced_are_replaced() -> None:
    compiled = nmcompile.compile(nn.Sequential(Opaque()), "training", config=SPARSE)
    assert type(compiled.get_submodule("0")) is Opaque
    assert isinstance(compiled.get_submodule("0.fc"), ThreeGemmLayer)


@pytest.mark.parametrize("mode", ["weights", "t-weights", "activations", "gradients", "training"])
def test_layers_dense_in_all_phases_stay_the_module_they_were(mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    config = CompileConfig(ends="sparse", layers={"1": None})
    children = list(model)
    compiled = nmcompile.compile(model, mode, config=config, inplace=True)
    assert [isinstance(one, ThreeGemm) for one in compiled.children()] == [False, False, False, True]
    assert [one is child for one, child in zip(compiled.children(), children, strict=True)] == [True] * 4
    assert type(compiled.get_submodule("0")) is nn.Conv2d and type(compiled.get_submodule("1")) is nn.Linear
    assert not any("three_gemms" in vars(one) for one in children[:3])


def test_equal_classes_share_one_rewritten_class() -> None:
    compiled = nmcompile.compile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16), nn.Conv1d(8, 8, 1)), "dense")
    first, second, conv = (type(one) for one in compiled.children())
    assert first is second and first is not conv
    assert first.__mro__[1:3] == (ThreeGemmLayer, ThreeGemm) and issubclass(first, nn.Linear)


def test_a_module_used_twice_is_one_module_with_one_triple() -> None:
    shared = nn.Linear(8, 8)
    compiled = nmcompile.compile(nn.Sequential(shared, nn.ReLU(), shared), "dense")
    assert compiled.get_submodule("0") is compiled.get_submodule("2")


def test_attention_runs_its_projections_by_role() -> None:
    compiled = nmcompile.compile(nn.TransformerEncoderLayer(8, 2, 16), "training", config=SPARSE)
    attention = compiled.get_submodule("self_attn")
    assert isinstance(attention, ThreeGemmAttention) and isinstance(attention, nn.MultiheadAttention)
    assert list(attention.three_gemms) == ["in_proj", "out_proj"]
    assert not isinstance(attention.out_proj, ThreeGemm)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 8)),
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)),
        lambda: Functional(F.linear, 8, 4),
        lambda: fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))),
    ],
    ids=["modules", "attention", "functional", "graph"],
)
def test_everything_is_given_back(make: Callable[[], nn.Module]) -> None:
    model = make()
    states = [(one, type(one), dict(vars(one))) for one in model.modules()]
    nmcompile.compile(model, "training", config=SPARSE, inplace=True)
    assert any(isinstance(one, ThreeGemm) for one in model.modules())
    plain = nmcompile.decompile(model)
    assert [type(one).__qualname__ for one in plain.modules()] == [cls.__qualname__ for _, cls, _ in states]
    assert [list(vars(one)) for one in plain.modules()] == [list(state) for _, _, state in states]
    assert list(model.modules()) == [one for one, _, _ in states]


def test_a_trace_that_does_not_show_the_call_is_refused_before_anything_is_changed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Functional(F.linear, 8, 8))
    captured = capture_model(model)
    program = Program(captured, plan_phases(captured, preset("dense"), CompileConfig()))
    site = next(site for site in captured.sites if site.layer.name == "1.w")
    for node in captured.traces["1"].nodes:
        if node.name == site.role:
            node.target = torch.add
    triples = {site.layer.name: object() for site in captured.sites}
    with pytest.raises(PreconditionError, match=f"node '{site.role}' of layer '1.w' is not a conv or linear"):
        replace_modules(model, program, triples)  # type: ignore[arg-type]
    assert not any(isinstance(one, ThreeGemm) for one in model.modules())
