"""torch.compile of a compiled model: one graph, the same numbers, no recompilation from step to step."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig
from nmcompile.training import masks

STEPS = 6
EXACT = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 8))


def dense_at_the_end() -> nn.Module:
    """Return convolutions the last of which, of three channels, stays dense: inductor computes it in channels last."""
    convs = nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 8, 3)
    return nn.Sequential(*convs, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 8))


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Flatten(2), nn.Linear(25, 8), layer, nn.Flatten())


def trained(make: Callable[[], nn.Module], mode: str, backend: CompileCounterWithBackend | None) -> list[Tensor]:
    """Return losses and final parameters after some steps, with masks recomputed in between."""
    torch.manual_seed(0)
    model = nmcompile.compile(make(), mode, config=CompileConfig(refresh=2, ends="sparse"))
    run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 4, 5, 5, generator=generator), torch.randint(8, (8,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(parameter.detach() for parameter in model.parameters())]


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("mode", ["dense", "training", "t-weights", "activations", "gradients"])
def test_steps_are_the_same_bit_for_bit(mode: str, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = trained(network, mode, counter)
    expected = trained(network, mode, None)
    assert counter.frame_count == 1
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))


@pytest.mark.parametrize("backend", EXACT)
def test_attention_is_one_graph_too(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = trained(attention, "training", counter)
    assert counter.frame_count == 1
    for ours, expected in zip(compiled, trained(attention, "training", None), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("make", [network, dense_at_the_end])
def test_inductor_trains_alike(make: Callable[[], nn.Module]) -> None:
    """Without draws: its kernels sum in another order, which would move single draws."""
    counter = CompileCounterWithBackend("inductor")
    compiled = trained(make, "t-weights", counter)
    assert counter.frame_count == 1
    for ours, expected in zip(compiled, trained(make, "t-weights", None), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["dense", "training"])
def test_autocast_around_a_compiled_step(mode: str) -> None:
    torch.manual_seed(0)
    model = nmcompile.compile(network(), mode, config=CompileConfig(ends="sparse"))
    run, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(8, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        compiled, expected = run(x), model(x)
    assert compiled.dtype == torch.bfloat16 and torch.equal(compiled, expected)
    compiled.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def load_other(model: nn.Module) -> None:
    model.load_state_dict(nn.Linear(8, 8).state_dict())


def write_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).normal_()


def point_elsewhere(model: nn.Module) -> None:
    """Set `weight.data`, which counts no version."""
    nn.utils.vector_to_parameters(torch.randn(72), model.parameters())


def assign_other(model: nn.Module) -> None:
    model.load_state_dict(nn.Linear(8, 8).state_dict(), assign=True)


@pytest.fixture
def no_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take torch for one that cannot guard on objects."""
    monkeypatch.setattr(masks, "guards_of", lambda _: None)


@pytest.mark.usefixtures("no_guards")
def test_graphs_rebuild_masks_if_no_guard_can() -> None:
    test_masks_follow_other_writes_too("aot_eager")


@pytest.mark.parametrize("backend", [*EXACT, "inductor"])
def test_masks_follow_other_writes_too(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    torch.manual_seed(0)
    model = nmcompile.compile(nn.Linear(8, 8), "t-weights", config=CompileConfig(refresh=None, ends="sparse"))
    run, x = torch.compile(model, backend=counter, fullgraph=True), torch.randn(4, 8)
    run(x)
    for change in (load_other, write_in_place, point_elsewhere):
        change(model)
        output = run(x)  # Before the copy below, which would notice the write.
        fresh = nmcompile.compile(nmcompile.decompile(model), "t-weights", config=CompileConfig(ends="sparse"))
        torch.testing.assert_close(output, fresh(x))
    assert counter.frame_count == 1


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


CALLERS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "function": lambda model: torch.compile(lambda x: 2 * model(x), backend="aot_eager", fullgraph=True),
    "module": lambda model: torch.compile(Twice(model), backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("change", [load_other, write_in_place, point_elsewhere, assign_other])
def test_a_write_between_steps_is_seen_wherever_the_model_is_called(
    change: Callable[[nn.Module], None], caller: str
) -> None:
    torch.manual_seed(0)
    model = nmcompile.compile(nn.Linear(8, 8), "t-weights", config=CompileConfig(refresh=None, ends="sparse"))
    run, x = CALLERS[caller](model), torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        run(x).square().sum().backward()
        optimizer.step()
        change(model)
        output = run(x)
        fresh = nmcompile.compile(nmcompile.decompile(model), "t-weights", config=CompileConfig(ends="sparse"))
        torch.testing.assert_close(output, 2 * fresh(x))


@pytest.mark.parametrize("refresh", [2, None])
def test_a_compiled_optimizer_keeps_the_refresh_period(refresh: int | None) -> None:
    states = []
    for step_of in (lambda optimizer: optimizer.step, lambda optimizer: torch.compile(optimizer.step, backend="eager")):
        torch.manual_seed(0)
        config = CompileConfig(refresh=refresh, ends="sparse")
        model = nmcompile.compile(nn.Linear(8, 8), "t-weights", config=config)
        optimizer, x = torch.optim.SGD(model.parameters(), 0.5), torch.randn(16, 8)
        step = step_of(optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            step()
        state = nmcompile.sparse_state_dict(model)
        states.append((state["weight.mask"], state["weight.clock"].tolist()))
    assert torch.equal(states[0][0], states[1][0]) and states[0][1] == states[1][1] == [5, 0]


def test_a_report_sees_that_a_compiled_model_ran() -> None:
    model = nmcompile.compile(network(), config=CompileConfig(ends="sparse"))
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(8, 4, 5, 5))
    assert "2 of 2 layers sparse" in str(nmcompile.inspect(model))
