"""SR-STE: the optimizer sees g + λ (1 - mask) ∘ w, whatever else scales or accumulates gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.training.find_masks import masks_of

LAMBDA = 0.25
X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


def compiled(sr_ste: float) -> nn.Linear:
    torch.manual_seed(1)
    model = nmcompile.compile(nn.Linear(8, 8), "weights", config=CompileConfig(sr_ste=sr_ste, ends="sparse"))
    assert isinstance(model, nn.Linear)
    return model


def weight_change(
    model: nn.Linear, micro_batches: int, scaler: torch.amp.GradScaler | None = None, fused: bool = False
) -> Tensor:
    """Return the change of the weight by one SGD step with rate 1."""
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1.0, fused=fused)
    for part in X.chunk(micro_batches):
        loss = model(part).square().sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
    return model.weight.detach() - before


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_pruned_weights_decay_by_lambda(micro_batches: int, scaled: bool, fused: bool) -> None:
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None for _ in range(2)]
    decayed, plain = compiled(LAMBDA), compiled(0.0)
    weight = decayed.weight.detach().clone()
    first, second = (weight_change(m, micro_batches, s, fused) for m, s in zip((decayed, plain), scalers, strict=True))
    difference = first - second
    (mask,) = masks_of(decayed).values()
    expected = torch.where(mask.tensor, 0.0, -LAMBDA * weight)
    torch.testing.assert_close(difference, expected)


@pytest.mark.parametrize("as_keyword", [False, True])
def test_gradients_that_a_closure_computes_decay_too(as_keyword: bool) -> None:
    changes = []
    for model in (compiled(LAMBDA), compiled(0.0)):
        before, optimizer = model.weight.detach().clone(), torch.optim.SGD(model.parameters(), 1.0)

        def closure(model: nn.Linear = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(X).square().sum()
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert loss is not None and bool(loss > 0)
        changes.append(model.weight.detach() - before)
        (mask,) = masks_of(model).values()
    torch.testing.assert_close(changes[0] - changes[1], torch.where(mask.tensor, 0.0, -LAMBDA * before))


def test_a_skipped_step_decays_nothing() -> None:
    model, scaler = compiled(LAMBDA), torch.amp.GradScaler("cpu", init_scale=float(torch.finfo(torch.float32).max))
    assert not weight_change(model, 1, scaler).any()


def test_a_weight_that_was_compiled_twice_decays_once() -> None:
    """Calibration first compiles a trial copy, which lives on until it is collected."""
    first, plain = compiled(LAMBDA), compiled(0.0)
    weight = first.weight.detach().clone()
    last = nmcompile.compile(first, "weights", config=CompileConfig(sr_ste=LAMBDA, ends="sparse"))
    assert isinstance(last, nn.Linear)
    difference = weight_change(last, 1) - weight_change(plain, 1)
    (mask,) = masks_of(last).values()
    torch.testing.assert_close(difference, torch.where(mask.tensor, 0.0, -LAMBDA * weight))
    assert masks_of(first)


def test_a_scale_beyond_float16_leaves_its_weights_finite() -> None:
    model = compiled(LAMBDA).half()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 0.01, fused=True), torch.amp.GradScaler("cpu", 2.0**16)
    before = model.weight.detach().clone()
    scaler.scale(model(X.half()).float().mean()).backward()
    scaler.step(optimizer)
    assert bool(model.weight.isfinite().all()) and not torch.equal(model.weight, before)


class Around(torch.optim.Optimizer):
    """An optimizer that lets another one make its steps, as ZeRO and Lookahead do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_an_optimizer_around_another_counts_and_decays_once(with_closure: bool) -> None:
    changes = []
    for model in (compiled(LAMBDA), compiled(0.0)):
        optimizer, before = Around(torch.optim.SGD(model.parameters(), 1.0)), model.weight.detach().clone()

        def closure(model: nn.Linear = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(X).square().sum()
            loss.backward()
            return loss

        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        (mask,) = masks_of(model).values()
        assert mask.steps == 1
        changes.append(model.weight.detach() - before)
    torch.testing.assert_close(changes[0] - changes[1], torch.where(mask.tensor, 0.0, -LAMBDA * before))
