"""A copy that is written while its model is trained takes the model's masks, until it goes its own way."""

import copy
import pickle
from typing import Any, Literal

import pytest
import timm.utils
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import nmcompile
from nmcompile import CompileConfig
from nmcompile.training.find_masks import masks_of

X = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))


def compiled(refresh: int | Literal["steady"] | None = "steady") -> nn.Module:
    torch.manual_seed(2)
    return nmcompile.compile(nn.Linear(16, 16), "weights", config=CompileConfig(refresh=refresh, ends="sparse"))


def train(model: nn.Module, steps: int = 6, average: nn.Module | None = None) -> None:
    """Train a model and update an average of it after each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()
        if average is not None:
            write_average(average, model)


@torch.no_grad()
def write_average(average: nn.Module, model: nn.Module) -> None:
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        mine.lerp_(theirs, 0.2)


def mask_of(model: nn.Module) -> Tensor:
    """Return the mask of a model, as it is after a call."""
    with torch.no_grad():
        model(X)
    (mask,) = masks_of(model).values()
    return mask.tensor.clone()


def two_largest(model: nn.Module) -> Tensor:
    """Return the mask of a weight's own magnitudes, found one by one."""
    blocks = model.get_parameter("weight").detach().abs().unflatten(1, (-1, 4))
    larger = (blocks.unsqueeze(-2) > blocks.unsqueeze(-1)).sum(-1)
    return (larger < 2).flatten(1)


def follows(average: nn.Module, model: nn.Module) -> bool:
    return torch.equal(mask_of(average), mask_of(model)) and not torch.equal(mask_of(average), two_largest(average))


@pytest.mark.parametrize("refresh", ["steady", 1, 4, None])
def test_an_average_has_the_masks_of_its_model(refresh: int | Literal["steady"] | None) -> None:
    model = compiled(refresh)
    average = copy.deepcopy(model)
    train(model, average=average)
    assert follows(average, model)
    train(model, average=average)
    assert follows(average, model)


def test_looking_at_an_average_changes_no_training() -> None:
    alone, watched = compiled(), compiled()
    average = copy.deepcopy(watched)
    for _ in range(5):
        train(alone, 3)
        train(watched, 3, average)
        with torch.no_grad():
            average(X)
    assert torch.equal(alone.get_parameter("weight"), watched.get_parameter("weight"))
    states = nmcompile.sparse_state_dict(alone), nmcompile.sparse_state_dict(watched)
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_an_average_outlives_its_model() -> None:
    model = compiled()
    average = copy.deepcopy(model)
    train(model, average=average)
    expected = mask_of(model)
    del model
    assert torch.equal(mask_of(average), expected) and not torch.equal(expected, two_largest(average))


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_an_average_that_is_loaded_goes_its_own_way(kind: str) -> None:
    """Until it is an average again: a run that resumes loads both."""
    model = compiled()
    utils: Any = timm.utils
    average: nn.Module = (AveragedModel(model) if kind == "torch" else utils.ModelEmaV3(model)).module
    train(model, average=average)
    assert follows(average, model)
    average.load_state_dict(nn.Linear(16, 16).state_dict())
    assert torch.equal(mask_of(average), two_largest(average))
    train(model)
    assert torch.equal(mask_of(average), two_largest(average))
    train(model, average=average)
    assert follows(average, model)


def test_an_assigned_weight_has_a_mask_of_its_own() -> None:
    model = compiled()
    average = copy.deepcopy(model)
    train(model, average=average)
    average.weight = nn.Parameter(torch.randn(16, 16))
    assert torch.equal(mask_of(average), two_largest(average))


def test_a_write_that_no_training_explains_is_no_average() -> None:
    model = compiled()
    train(model)
    other = copy.deepcopy(model)
    nn.init.normal_(other.get_parameter("weight"))
    assert torch.equal(mask_of(other), two_largest(other))


def test_a_copy_that_is_trained_follows_no_more() -> None:
    model = compiled(refresh=100)
    trained = copy.deepcopy(model)
    train(trained, 1)
    train(model)
    nn.init.normal_(trained.get_parameter("weight"))
    assert torch.equal(mask_of(trained), two_largest(trained))


def test_a_copy_that_is_trained_unseen_follows_no_more() -> None:
    model = compiled()
    other = copy.deepcopy(model)
    train(model)
    (other(X) - Y).square().mean().backward()
    weight = other.get_parameter("weight")
    assert weight.grad is not None
    weight.data -= 50 * weight.grad
    with pytest.warns(UserWarning, match="no optimizer step was seen"), torch.no_grad():
        other(X)
    assert torch.equal(mask_of(other), two_largest(other))


def test_the_nearest_origin_that_is_trained_counts() -> None:
    base = compiled()
    model = copy.deepcopy(base)
    average = copy.deepcopy(model)
    train(model, average=average)
    assert follows(average, model) and not torch.equal(mask_of(average), mask_of(base))


def test_a_copy_of_an_average_goes_on_as_one() -> None:
    model = compiled()
    first = copy.deepcopy(model)
    train(model, average=first)
    second = copy.deepcopy(first)
    assert follows(second, model)
    train(model, 12, second)
    assert follows(second, model)


def test_copies_of_copies_hold_only_living_origins() -> None:
    model = compiled()
    average = copy.deepcopy(model)
    for _ in range(5):
        average = copy.deepcopy(average)
    (mask,) = masks_of(average).values()
    assert len(mask.origins) <= 3


def test_a_saved_average_has_the_masks_of_its_model() -> None:
    """Saved before its first call, as a pickle and as a state; neither refers to the model."""
    model = compiled()
    average = copy.deepcopy(model)
    train(model, average=average)
    state = nmcompile.sparse_state_dict(copy.deepcopy(average))
    assert torch.equal(state["weight.mask"], mask_of(model)) and state["weight.clock"][1] == 0
    loaded = pickle.loads(pickle.dumps(average))
    train(model)
    assert torch.equal(mask_of(loaded), state["weight.mask"])
    (mask,) = masks_of(loaded).values()
    assert mask.origins == ()


def test_inspection_previews_the_mask_of_the_model() -> None:
    model = compiled()
    average = copy.deepcopy(model)
    train(model, average=average)
    (mask,) = masks_of(average).values()
    assert torch.equal(mask.preview(average.get_parameter("weight")), mask_of(model))


def test_torch_compile_runs_an_average_under_the_masks_of_the_model() -> None:
    model = compiled()
    average = copy.deepcopy(model)
    run = torch.compile(average, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        run(X)
        train_average = torch.enable_grad()(train)
        train_average(model, average=average)
        weight, bias = average.get_parameter("weight"), average.get_parameter("bias")
        torch.testing.assert_close(run(X), nn.functional.linear(X, weight * mask_of(model), bias))
