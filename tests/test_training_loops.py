"""Training loops of other libraries: masks follow the weight, averages take the model's, dense stays dense."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import schedulefree
import timm.optim
import timm.scheduler
import timm.utils
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.training.find_masks import masks_of

STEPS, PERIOD = 5, 2
Loop = Callable[[nn.Module], Any]
optim: Any = timm.optim


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 8, generator=generator), torch.randn(16, 8, generator=generator)
    return (model(x) - y).square().mean()


def plain_loop(make: Callable[[nn.Module], Any], after: Callable[[int], object] = lambda step: None) -> Loop:
    def loop(model: nn.Module) -> None:
        train(model, make(model), after)

    return loop


def train(model: nn.Module, optimizer: Any, after: Callable[[int], object] = lambda step: None) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        after(step)


class SAM(Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021) around SGD, in the form in which step() takes a closure."""

    def __init__(self, parameters: Any, radius: float = 0.05) -> None:
        self.base = SGD(parameters, 0.1, momentum=0.9)
        self.radius = radius
        super().__init__(self.base.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        moves = [p.grad * self.radius / norm for p in parameters]
        torch._foreach_add_(parameters, moves)
        with torch.enable_grad():
            closure()
        torch._foreach_sub_(parameters, moves)
        self.base.step()


def sharpness_aware(model: nn.Module) -> None:
    optimizer = SAM(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()

        def closure(step: int = step) -> None:
            optimizer.zero_grad()
            loss_of(model, step).backward()

        optimizer.step(closure)


def in_backward(model: nn.Module) -> None:
    """Step each parameter as soon as its gradient is there (torch's tutorial `optimizer_step_in_backward`)."""
    optimizers = {parameter: SGD([parameter], 0.1, momentum=0.9) for parameter in model.parameters()}

    def hook(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    for step in range(STEPS):
        loss_of(model, step).backward()


def timm_script(model: nn.Module) -> Any:
    """Train as timm's train.py does: its optimizer, scheduler and average."""
    optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
    schedulers: Any = timm.scheduler
    scheduler, _ = schedulers.create_scheduler_v2(optimizer, sched="cosine", num_epochs=STEPS)
    utils: Any = timm.utils
    average = utils.ModelEmaV3(model, decay=0.9)

    def after(step: int) -> None:
        average.update(model, step=step)
        scheduler.step(step + 1)

    train(model, optimizer, after)
    return average


def averaged(how: Callable[..., Any]) -> Loop:
    def loop(model: nn.Module) -> AveragedModel:
        average = AveragedModel(model, multi_avg_fn=how)
        train(model, SGD(model.parameters(), 0.1), lambda step: average.update_parameters(model))
        return average

    return loop


LOOPS: dict[str, Loop] = {
    "SAM": sharpness_aware,
    "in backward": in_backward,
    "lion": plain_loop(lambda model: optim.create_optimizer_v2(model, opt="lion", lr=1e-3)),
    "lookahead": plain_loop(lambda model: optim.create_optimizer_v2(model, opt="lookahead_sgd", lr=0.1)),
    "adafactor": plain_loop(lambda model: optim.create_optimizer_v2(model, opt="adafactorbv", lr=1e-2)),
    "muon": plain_loop(lambda model: optim.create_optimizer_v2(model, opt="muon", lr=1e-2)),
}
AVERAGES: dict[str, Loop] = {
    "EMA of torch": averaged(get_ema_multi_avg_fn(0.9)),
    "SWA of torch": averaged(get_swa_multi_avg_fn()),
    "EMA of timm": timm_script,
}


def same_parameters(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("loop", LOOPS | AVERAGES)
def test_a_dense_compilation_trains_as_the_model_does(loop: str) -> None:
    plain, dense = network(), nmcompile.compile(network(), "dense")
    run = (LOOPS | AVERAGES)[loop]
    run(plain)
    run(dense)
    assert same_parameters(plain, dense)


@pytest.mark.parametrize("loop", LOOPS | AVERAGES)
def test_masks_follow_the_period_and_nothing_else(loop: str) -> None:
    """Writes inside of a step are no writes from elsewhere, which would make the masks stale; no warning says so."""
    model = nmcompile.compile(network(), "t-weights", config=CompileConfig(ends="sparse", refresh=PERIOD))
    (LOOPS | AVERAGES)[loop](model)
    assert {mask.steps for mask in masks_of(model).values()} == {STEPS}
    assert {mask.clock.staleness for mask in masks_of(model).values()} == {0}
    x = torch.randn(4, 8)
    final = nmcompile.finalize(model)
    assert nmcompile.verify(model).ok and nmcompile.verify(final).ok
    assert torch.equal(final(x), model(x)) and not torch.equal(nmcompile.decompile(model)(x), model(x))


@pytest.mark.parametrize("refresh", [PERIOD, "steady", None])
@pytest.mark.parametrize("loop", AVERAGES)
def test_an_average_is_pruned_by_the_masks_of_the_model(loop: str, refresh: int | Literal["steady"] | None) -> None:
    """Its weights were trained under them; their magnitudes alone would give other masks."""
    config = CompileConfig(ends="sparse", refresh=refresh)
    model = nmcompile.compile(network(), "t-weights", config=config)
    average: nn.Module = AVERAGES[loop](model).module
    x, final, plain = torch.randn(4, 8), nmcompile.finalize(average), network()
    model(x)
    plain.load_state_dict(average.state_dict())
    with torch.no_grad():
        for name, mask in masks_of(model).items():
            plain.get_parameter(name).mul_(mask.tensor)
    assert nmcompile.verify(average).ok and nmcompile.verify(final).ok
    torch.testing.assert_close(average(x), plain(x))
    torch.testing.assert_close(final(x), plain(x))
    fresh = nmcompile.compile(nmcompile.decompile(average), "t-weights", config=config)
    assert not torch.equal(average(x), fresh(x)) and not torch.equal(average(x), model(x))


def test_schedule_free_swaps_weights_and_masks() -> None:
    """`optimizer.eval()` puts the average in place: masks follow, and the finalized model is that average."""
    model = nmcompile.compile(network(), "t-weights", config=CompileConfig(ends="sparse", refresh=None))
    optimizer, x = schedulefree.SGDScheduleFree(model.parameters(), lr=0.5), torch.randn(4, 8)
    optimizer.train()
    train(model, optimizer)
    trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.eval()
    fresh = nmcompile.compile(nmcompile.decompile(model), "t-weights", config=CompileConfig(ends="sparse"))
    with torch.no_grad():
        assert torch.equal(model(x), fresh(x)) and torch.equal(nmcompile.finalize(model)(x), fresh(x))
    optimizer.train()
    loss_of(model, 0).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), trained[name])
    assert nmcompile.verify(model).ok


def test_a_failed_step_does_not_explain_later_writes() -> None:
    model = nmcompile.compile(network(), "t-weights", config=CompileConfig(ends="sparse", refresh=None))
    failing, other = SAM(model.parameters()), SGD(model.parameters(), 0.0)
    loss_of(model, 0).backward()
    with pytest.raises(TypeError, match="not callable"):
        failing.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_().add_(torch.randn_like(parameter))
    other.step()
    x, config = torch.randn(4, 8), CompileConfig(ends="sparse")
    assert torch.equal(model(x), nmcompile.compile(nmcompile.decompile(model), "t-weights", config=config)(x))


def test_schedule_free_is_dense_under_a_dense_compilation() -> None:
    plain, dense = network(), nmcompile.compile(network(), "dense")
    for model in (plain, dense):
        optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
        optimizer.train()
        train(model, optimizer)
        optimizer.eval()
    assert same_parameters(plain, dense)
