"""A captured step trains as a loop does. Without a GPU, a stand-in runs the captured function for each replay."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig
from nmcompile.errors import ConfigError
from nmcompile.pruning.magnitude import mask as greedy_mask
from nmcompile.training import graphed_step, masks
from nmcompile.training import step as tell_step
from nmcompile.training.find_masks import masks_of
from nmcompile.training.graphed_step import WARM_UPS, GraphedStep
from nmcompile.training.recorder import CudaRecorder
from nmcompile.training.refresh_mask import refresh_mask

STEPS = WARM_UPS + 6
CPU = torch.device("cpu")


class StandIn:
    """A recorder that runs the captured function again for each replay, and knows when one is being run."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.is_replaying = False
        self.result = torch.empty(())

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        self.calls.append("run")
        return function()

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        self.calls.append("capture")
        self.function = function
        return self.result

    def replay(self) -> None:
        self.calls.append("replay")
        self.is_replaying = True
        self.result.copy_(self.function())
        self.is_replaying = False


def batches(steps: int = STEPS, device: torch.device = CPU) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [
        (torch.randn(16, 8, generator=generator), torch.randint(8, (16,), generator=generator)) for _ in range(steps)
    ]
    return [(x.to(device), y.to(device)) for x, y in made]


def compiled(
    mode: str = "training", device: torch.device = CPU, sr_ste: float = 0.0, refresh: int | Literal["steady"] = 2
) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)).to(device)
    return nmcompile.compile(net, mode, config=CompileConfig(refresh=refresh, ends="sparse", sr_ste=sr_ste))


def graphed(
    model: nn.Module, optimizer: torch.optim.Optimizer, example: Sequence[Tensor] | None = None
) -> tuple[GraphedStep, StandIn]:
    recorder = StandIn()
    example = batches(1)[0] if example is None else example
    return GraphedStep(model, F.cross_entropy, optimizer, example, CPU, recorder), recorder


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, given: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return the losses of an ordinary loop."""
    losses = []
    for x, y in given:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Compare weights, buffers, masks, counts of steps and of draws."""
    states = [model.state_dict() | nmcompile.sparse_state_dict(model) for model in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name].cpu(), states[1][name].cpu()) for name in states[0])


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 0.1, foreach=True),
}


@pytest.mark.parametrize("sr_ste", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["dense", "weights", "t-weights", "training"])
def test_it_trains_as_a_loop_does(mode: str, name: str, sr_ste: float) -> None:
    model, expected = compiled(mode, sr_ste=sr_ste), compiled(mode, sr_ste=sr_ste)
    step, recorder = graphed(model, OPTIMIZERS[name](model))
    losses = [step(x, y) for x, y in batches()]
    assert all(map(torch.equal, losses, trained(expected, OPTIMIZERS[name](expected), batches())))
    assert_same(model, expected)
    assert recorder.calls == ["run"] * WARM_UPS + ["capture"] + ["replay"] * (STEPS - WARM_UPS)


def test_steady_masks_are_those_of_a_loop() -> None:
    model, expected = compiled(refresh="steady"), compiled(refresh="steady")
    step, _ = graphed(model, OPTIMIZERS["sgd"](model))
    losses = [step(x, y) for x, y in batches()]
    assert all(map(torch.equal, losses, trained(expected, OPTIMIZERS["sgd"](expected), batches())))
    assert_same(model, expected)


def test_a_model_under_torch_compile_trains_alike() -> None:
    model, expected = compiled(), compiled()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert isinstance(run, nn.Module)
    step, _ = graphed(run, OPTIMIZERS["sgd"](model))
    losses = [step(x, y) for x, y in batches()]
    assert all(map(torch.equal, losses, trained(expected, OPTIMIZERS["sgd"](expected), batches())))
    assert_same(model, expected)


def test_masks_are_rebuilt_between_replays_into_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled("t-weights")
    step, recorder = graphed(model, torch.optim.SGD(model.parameters(), 0.5))
    tensors = {name: mask.tensor for name, mask in masks_of(model).items()}
    rebuilt: list[bool] = []

    def noted(*args: Any) -> None:
        rebuilt.append(recorder.is_replaying)
        refresh_mask(*args)

    monkeypatch.setattr(masks, "refresh_mask", noted)
    for x, y in batches():
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        step(x, y)
        assert all(mask.tensor is tensors[name] for name, mask in masks_of(model).items())
    assert rebuilt == [False] * (len(tensors) * -(-STEPS // 2))
    assert any(not torch.equal(before[name], tensor) for name, tensor in tensors.items())


def test_a_write_between_replays_is_seen_by_the_next() -> None:
    model = compiled("weights")
    step, _ = graphed(model, torch.optim.SGD(model.parameters(), 0.0))
    for x, y in batches():
        step(x, y)
    weight = model.get_parameter("0.weight")
    with torch.no_grad():
        weight.copy_(torch.randn(16, 8))
    step(x, y)
    assert torch.equal(masks_of(model)["0.weight"].tensor, greedy_mask(weight.detach(), "2:4"))


def test_the_example_is_not_trained_on_and_losses_stay() -> None:
    model = compiled("weights")
    example = (torch.full((16, 8), torch.nan), torch.zeros(16, dtype=torch.int64))
    step, _ = graphed(model, torch.optim.SGD(model.parameters(), 0.1), example)
    losses = [step(x, y) for x, y in batches()]
    assert torch.isfinite(torch.stack(losses)).all() and len({float(loss) for loss in losses}) == STEPS
    assert not any(loss.requires_grad for loss in losses) and example[0].isnan().all()


def test_steps_of_the_optimizer_outside_count_too() -> None:
    model = compiled("weights")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step, _ = graphed(model, optimizer)
    step(*batches(1)[0])
    trained(model, optimizer, batches(2))
    tell_step(model)
    assert {mask.steps for mask in masks_of(model).values()} == {4}


def test_a_batch_of_another_shape_is_refused() -> None:
    model = compiled("weights")
    step, _ = graphed(model, torch.optim.SGD(model.parameters(), 0.1))
    x, y = batches(1)[0]
    wrong: dict[str, tuple[Tensor, ...]] = {
        r"batch\[0\] is float32 of shape \(7, 8\).*takes float32 of shape \(16, 8\)": (x[:7], y[:7]),
        r"batch\[1\] is int32 of shape \(16,\).*takes int64": (x, y.int()),
        "given 1 tensors; its example has 2": (x,),
    }
    for words, batch in wrong.items():
        with pytest.raises(ConfigError, match=words):
            step(*batch)
    assert {mask.steps for mask in masks_of(model).values()} == {0}


def test_a_number_that_changes_after_the_capture_is_refused() -> None:
    model = compiled("weights")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, WARM_UPS + 2, gamma=0.5)
    step, _ = graphed(model, optimizer)
    for x, y in batches(WARM_UPS + 2):
        step(x, y)
        schedule.step()
    with pytest.raises(ConfigError, match=r"lr was 0\.1 when the step was captured, and is 0\.05"):
        step(x, y)


def test_a_rate_that_is_a_tensor_may_change() -> None:
    found = []
    for is_graphed in (False, True):
        model = compiled("weights")
        optimizer = torch.optim.SGD(model.parameters(), torch.tensor(0.1), foreach=False)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        step, _ = graphed(model, optimizer)
        for x, y in batches():
            step(x, y) if is_graphed else trained(model, optimizer, [(x, y)])
            schedule.step()
        found.append(model)
    assert_same(*found)


def computed_weight() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    return nmcompile.compile(nn.Sequential(layer), "weights", config=CompileConfig(ends="sparse"))


REFUSED: dict[str, tuple[str, Callable[[], nn.Module], Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "device": ("the model is on cpu; .* on one GPU", compiled, OPTIMIZERS["sgd"]),
    "not capturable": (
        r"AdamW counts its steps on the CPU.*AdamW\(\.\.\., capturable=True\)",
        compiled,
        OPTIMIZERS["adamw"],
    ),
    "never capturable": ("take torch.optim.SGD", compiled, lambda model: torch.optim.Adagrad(model.parameters())),
    "computed": (r"weight '0\..*' is computed from others", computed_weight, OPTIMIZERS["sgd"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_step_that_cannot_be_captured_is_refused(case: str) -> None:
    words, make, optimizer_of = REFUSED[case]
    model = make()
    with pytest.raises(ConfigError, match=words):
        graphed_step(model, F.cross_entropy, optimizer_of(model), batches(1)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@pytest.mark.parametrize("mode", ["weights", "training"])
def test_a_real_graph_trains_as_a_loop_does(mode: str) -> None:
    device = torch.device("cuda")
    model, expected = compiled(mode, device), compiled(mode, device)
    step = graphed_step(model, F.cross_entropy, OPTIMIZERS["sgd"](model), batches(1)[0])
    assert isinstance(step._recorder, CudaRecorder)
    losses = [step(x, y) for x, y in batches()]
    torch.testing.assert_close(losses, trained(expected, OPTIMIZERS["sgd"](expected), batches(device=device)))
    draws = [
        {name: x for name, x in nmcompile.sparse_state_dict(one).items() if name.endswith(("clock", "draw"))}
        for one in (model, expected)
    ]
    torch.testing.assert_close(*draws)
