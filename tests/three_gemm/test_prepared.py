"""Prepared graphs: equal calls choose no kernel again, with the same bits; any other look of the operands asks anew."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.cpu import gemm_call
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.shared import known_choices
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.prepared import Prepared

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)

LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(16, 16), torch.randn(8, 16)),
    "conv": lambda: (nn.Conv2d(16, 16, 3, padding=1), torch.randn(4, 16, 6, 5)),
}
GEMMS = 3


def made(layer: str, mode: str = "training") -> tuple[nn.Module, Tensor]:
    module, x = LAYERS[layer]()
    return nmcompile.compile(nn.Sequential(module), mode, config=CompileConfig(ends="sparse")), x.requires_grad_()


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return output and gradients of a training step."""
    model.zero_grad()
    x.grad = None
    output = model(x)
    output.float().square().sum().backward()
    return [output.detach(), *(t.grad.clone() for t in (x, *model.parameters()) if t.grad is not None)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the phase of each GEMM that chooses its kernel."""
    found: list[str] = []
    run = gemm_call.GemmCall.run

    def noting(call: gemm_call.GemmCall, *args: Callable[..., object]) -> object:
        found.append(call.phase)
        return run(call, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(gemm_call.GemmCall, "run", noting)
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_an_equal_call_chooses_nothing(layer: str, asked: list[str]) -> None:
    model, x = made(layer)
    step(model, x)
    assert len(asked) == GEMMS
    step(model, x)
    step(model, torch.randn_like(x).requires_grad_())
    assert len(asked) == GEMMS


@contextmanager
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def forgotten() -> Iterator[None]:
    known_choices.forget()
    yield


class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "threads": threads,
    "deterministic algorithms": deterministic,
    "forgotten choices": forgotten,
    "a dispatch mode": Seeing,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_another_setting_chooses_anew(layer: str, setting: str, asked: list[str]) -> None:
    model, x = made(layer)
    step(model, x)
    asked.clear()
    with SETTINGS[setting]():
        step(model, x)
    assert len(asked) == GEMMS


LOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "a shape": lambda x: x[:4] if x.dim() == 2 else x[..., :3],
    "strides": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "a dtype": lambda x: x.double(),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("look", LOOKS)
def test_another_look_chooses_anew(layer: str, look: str, asked: list[str]) -> None:
    model, x = made(layer)
    step(model, x)
    asked.clear()
    other = LOOKS[look](x.detach()).requires_grad_()
    if other.dtype != x.dtype:
        model.to(other.dtype)
    step(model, other)
    assert "forward" in asked
    asked.clear()
    step(model, other)
    assert not asked


def unprepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prepared, "knows", lambda *_: False)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("setting", [nullcontext, default_dtype, *SETTINGS.values()])
@pytest.mark.parametrize("mode", ["dense", "weights", "t-weights", "gradients", "training"])
@pytest.mark.parametrize("layer", LAYERS)
def test_bits_are_those_of_a_call_that_chooses(
    layer: str, mode: str, setting: Callable[[], AbstractContextManager[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = made(layer, mode)
    reference = copy.deepcopy(model)

    def run(each: nn.Module) -> list[Tensor]:
        first = step(each, x)
        with setting():
            return [*first, *step(each, x), *step(each, x)]

    results = run(model)
    unprepared(monkeypatch)
    for ours, wanted in zip(results, run(reference), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


def assign(layer: nn.Module, value: Tensor) -> None:
    layer.weight = nn.Parameter(value)


def swap_memory(layer: nn.Module, value: Tensor) -> None:
    layer.get_parameter("weight").data = value


@torch.no_grad()
def write(layer: nn.Module, value: Tensor) -> None:
    layer.get_parameter("weight").copy_(value)


@pytest.mark.filterwarnings("ignore:.*its weight changed after backward")
@pytest.mark.parametrize("change", [assign, swap_memory, write])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_replaced_weight_is_read(
    layer: str, change: Callable[[nn.Module, Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = made(layer)
    reference = copy.deepcopy(model)
    step(model, x)
    step(reference, x)
    value = torch.randn_like(model.get_submodule("0").get_parameter("weight"))
    change(model.get_submodule("0"), value)
    results = step(model, x)
    unprepared(monkeypatch)
    change(reference.get_submodule("0"), value.clone())
    for ours, wanted in zip(results, step(reference, x), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


def test_a_value_that_is_not_finite_leaves_the_choice_open(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmcompile.backends.shared.choose_kernel.SMALL", 0)
    model, x = made("linear", "weights")
    with torch.no_grad():
        x.fill_(torch.nan)
        model(x)
        asked.clear()
        model(x)
    assert asked


def test_a_copy_and_a_changed_graph_are_prepared_anew() -> None:
    model, x = made("linear")
    step(model, x)
    (triple,) = triples_of(model)
    assert triple.prepared
    assert not next(iter(triples_of(copy.deepcopy(model)))).prepared
    phase, before = next(iter(triple.prepared.items()))
    triple.graphs[phase].recompile()
    step(model, x)
    assert triple.prepared[phase] is not before
