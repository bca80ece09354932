"""Steps of training: a call of a layer is not one, nor is a step that a GradScaler skipped."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.training import masks
from nmcompile.training.find_masks import masks_of
from nmcompile.training.masks import WeightMask
from nmcompile.training.step_count import PENDING
from nmcompile.training.weight_clock import HOLDS

MANY = 30
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take an optimizer for gone after fewer backward calls than usual."""
    monkeypatch.setattr(masks, "SILENT_BACKWARDS", MANY)


def compiled(refresh: int | None = 3, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    return nmcompile.compile(net, "weights", config=CompileConfig(refresh=refresh, ends="sparse"))


def mask_of(model: nn.Module) -> WeightMask:
    return masks_of(model)["0.weight"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(MANY + 10):
            x = self.cell(x).tanh()
        return x


@pytest.mark.parametrize("steps", [1, 2])
def test_many_calls_in_a_step_are_no_reason_to_warn(steps: int) -> None:
    model = nmcompile.compile(Recurrent(), "weights", config=CompileConfig(ends="sparse"))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(steps):
            model(X[:1]).sum().backward()
            optimizer.step()
    (mask,) = masks_of(model).values()
    assert mask.steps == steps and mask.is_followed


def test_layers_that_are_not_trained_are_no_reason_to_warn() -> None:
    """The first layer of a model with a frozen backbone, written by hand now and then."""
    model = compiled(layers=3)
    for layer in (model[1], model[2]):  # type: ignore[index]
        layer.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(MANY + 2):
            model(X[:1]).sum().backward()
            optimizer.step()
            if index == MANY:
                model[1].weight.data.mul_(2)  # type: ignore[index]
    assert masks_of(model)["0.weight"].steps == MANY + 2 and masks_of(model)["1.weight"].steps == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam])
def test_a_step_that_a_scaler_had_skipped_does_not_count(kind: Callable[..., torch.optim.Optimizer]) -> None:
    """Fused optimizers are called anyway, and skip the step themselves."""
    model = compiled(refresh=2)
    optimizer, scaler = kind(model.parameters(), lr=0.1, fused=True), torch.amp.GradScaler("cpu", init_scale=4.0)
    steps, stale = [], []
    for is_finite in (False, True, False, False, True):
        model(X)
        for parameter in model.parameters():
            parameter.grad = None
        scaler.scale(model(X).square().sum() * (1.0 if is_finite else torch.inf)).backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        is_same = all(torch.equal(one, p) for one, p in zip(before, model.parameters(), strict=True))
        assert is_same != is_finite
        stale.append(int(mask_of(model).is_stale))
        steps.append(mask_of(model).steps)
    assert steps == [0, 1, 1, 1, 2] and stale == [0, 0, 0, 0, 1]


class NotRead(Tensor):
    """A result on a GPU, for which every look would wait."""

    @classmethod
    def __torch_function__(cls, *_: object, **__: object) -> object:
        raise AssertionError("the step waited for the device")


def skipped(by: float) -> Tensor:
    return torch.full((1,), by)


@pytest.mark.parametrize("refresh", [1, 4, None])
def test_results_are_read_only_where_they_decide(refresh: int | None) -> None:
    model = compiled(refresh)
    model(X)
    mask, unread = mask_of(model), skipped(0.0).as_subclass(NotRead)
    for _ in range(3):
        mask.after_step(unread)
    assert mask.is_stale == (refresh == 1)
    mask.counted.pending = [skipped(0.0), skipped(1.0), skipped(0.0)]
    assert mask.steps == 2 and mask.notes == 3 and not mask.counted.pending


def test_the_refresh_period_counts_steps_that_were_made() -> None:
    model, clock = compiled(refresh=3), []
    model(X)
    mask = mask_of(model)
    for by in (0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0):
        mask.after_step(skipped(by))
        clock.append(int(mask.is_stale))
        mask.clock.staleness = HOLDS
    assert clock == [0, 0, 0, 1, 0, 0, 0, 0, 1] and mask.steps == 6


def test_results_do_not_pile_up() -> None:
    mask = mask_of(compiled(refresh=None))
    for index in range(2 * PENDING):
        mask.after_step(skipped(float(index % 2)))
        assert len(mask.counted.pending) < PENDING
    assert mask.steps == PENDING
