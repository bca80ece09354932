"""The training schemes: what each phase prunes, quantizes and keeps, and how trainers step through the phases."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile
from nmcompile.api import callbacks, recipes
from nmcompile.errors import BackendUnavailable, ConfigError
from nmcompile.training import clips
from nmcompile.training.find_masks import masks_of

X = torch.randn(16, 8, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Flatten(),
        nn.Linear(64, 4),
    )  # fmt: skip


def train(model: nn.Module, steps: int = 12) -> list[float]:
    optimizer = torch.optim.SGD([*model.parameters(), *clips(model)], 0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: mask.tensor.clone() for name, mask in masks_of(model).items()}


def test_scheme_a_is_one_phase_from_scratch(net: nn.Module) -> None:
    (model,) = recipes.scheme_a(net, calibration=[X])
    assert len(clips(model)) == 2 and all(mask.sr_ste == recipes.SR_STE for mask in masks_of(model).values())
    losses = train(model)
    assert losses[-1] < losses[0]
    assert nmcompile.verify(nmcompile.finalize(model.eval())).ok


def test_scheme_b_fixes_the_masks_of_the_trained_weights(net: nn.Module) -> None:
    phases = recipes.scheme_b(net, calibration=[X])
    first = next(phases)
    assert not masks(first) and not clips(first)
    train(first)
    second = next(phases)
    before = masks(second)
    for name, mask in before.items():
        weight = dict(net.named_parameters())[name].detach()
        assert torch.equal(mask, nmcompile.pruning.mask(weight, "2:4", dim=1))
    losses = train(second, steps=60)
    assert losses[-1] < losses[0]
    assert all(torch.equal(mask, before[name]) for name, mask in masks(second).items())
    with pytest.raises(StopIteration):
        next(phases)


def test_asp_trains_dense_then_with_fixed_masks(net: nn.Module) -> None:
    phases = recipes.asp(net)
    dense = next(phases)
    assert dense is net
    train(dense)
    sparse = next(phases)
    sparse(X)
    before = masks(sparse)
    train(sparse, steps=60)
    assert before and all(torch.equal(mask, before[name]) for name, mask in masks(sparse).items())


def test_phases_share_the_parameters(net: nn.Module) -> None:
    for model in recipes.scheme_b(net, calibration=[X]):
        assert all(ours is theirs for ours, theirs in zip(model.parameters(), net.parameters(), strict=True))


def counted(log: list[int]) -> Iterator[nn.Module]:
    for phase in range(2):
        log.append(phase)
        yield nn.Identity()


def test_a_hugging_face_callback_starts_phases_at_their_epochs() -> None:
    log: list[int] = []
    callback = callbacks.trainer_callback(counted(log), begins=(0, 3))
    for epoch in range(5):
        callback.on_epoch_begin(None, SimpleNamespace(epoch=float(epoch)), None)
        assert log == ([0] if epoch < 3 else [0, 1])


def test_a_lightning_callback_starts_phases_at_their_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses only the two attributes of Lightning that the callback reads; Lightning is not installed with the tests."""
    monkeypatch.setattr(callbacks, "import_module", lambda name: SimpleNamespace(Callback=object))
    log: list[int] = []
    callback: Any = callbacks.lightning_callback(counted(log), begins=(0, 2))
    for epoch in range(4):
        callback.on_train_epoch_start(SimpleNamespace(current_epoch=epoch), nn.Identity())
        assert log == ([0] if epoch < 2 else [0, 1])


def test_a_missing_trainer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(callbacks, "import_module", missing)
    with pytest.raises(BackendUnavailable, match="pip install lightning"):
        callbacks.lightning_callback(iter([]), begins=(0,))


@pytest.mark.parametrize("begins", [(), (1,), (0, 3, 3), (0, 5, 2)])
def test_phases_begin_at_rising_epochs(begins: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="rising"):
        callbacks.trainer_callback(iter([]), begins)


def test_a_trainer_keeps_the_module_that_it_was_given(net: nn.Module) -> None:
    for model in recipes.scheme_b(net, calibration=[X], inplace=True):
        assert model is net
