"""Distillation: the pruned model comes closer to its teacher, which does not change."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig
from nmcompile.api.distill import distill
from nmcompile.errors import CalibrationError, ConfigError, StateError
from nmcompile.training import recipes
from nmcompile.training.find_masks import masks_of
from tests.api.masked_outputs import MaskedOutputs

SPARSE = CompileConfig(ends="sparse", masks="wanda")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32),
        nn.BatchNorm1d(32),
        nn.GELU(),
        nn.Dropout(0.5),
        nn.Linear(32, 32),
        nn.GELU(),
        nn.Linear(32, 8),
    )


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(40, 16, generator=generator) for _ in range(4)]


def pruned(dense: nn.Module) -> Any:
    return nmcompile.compile(copy.deepcopy(dense), "weights", calibration=batches(), config=SPARSE)


def distance(one: nn.Module, other: nn.Module) -> float:
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float((one.eval()(x) - other.eval()(x)).norm())


def test_the_pruned_model_comes_closer_and_stays_sparse() -> None:
    dense = network()
    before = copy.deepcopy(dense.state_dict())
    model = pruned(dense)
    masks = {name: mask.tensor.clone() for name, mask in masks_of(model).items()}
    start = distance(model, dense)
    losses = distill(model, dense, batches(), steps=200)
    assert len(losses) == 200
    assert losses[-1] < 0.8 * losses[0]
    assert distance(model, dense) < 0.9 * start
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert all(torch.equal(masks[name], mask.tensor) for name, mask in masks_of(model).items())
    assert nmcompile.verify(nmcompile.finalize(model), "2:4").ok


def test_it_is_a_recipe() -> None:
    assert recipes.distill is distill


def test_modes_and_statistics_are_as_before() -> None:
    dense = network()
    model = pruned(dense).train()
    statistics = model[1].running_mean.clone()
    distill(model, dense, batches(), steps=3)
    assert model.training and model.get_submodule("3").training
    assert torch.equal(model[1].running_mean, statistics)


def test_outputs_that_are_masked_with_an_infinity_do_not_count() -> None:
    dense = MaskedOutputs(network())
    losses = distill(pruned(dense), dense, batches(), steps=40)
    assert losses[-1] < losses[0]


def test_optimizer_and_loss_are_the_callers() -> None:
    dense = network()
    model = pruned(dense)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loss(student: Any, teacher: Any) -> Tensor:
        return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")

    losses = distill(model, dense, batches(), steps=60, optimizer=optimizer, loss=loss)
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_shared_parameter_is_refused() -> None:
    dense = network()
    model = nmcompile.compile(dense, "weights", calibration=batches(), config=SPARSE)
    with pytest.raises(StateError, match=r"'0\.weight' is a parameter of both models"):
        distill(model, dense, batches())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ConfigError, "steps is 0"),
        ({"data": []}, CalibrationError, "empty after 0 of 300 steps"),
        (
            {"data": iter(batches())},
            CalibrationError,
            "empty after 4 of 300 steps; give batches",
        ),
        ({"data": [torch.full((4, 16), torch.nan)]}, CalibrationError, "the loss of step 0 is nan"),
        ({"data": [torch.randn(4, 3)]}, CalibrationError, "batch 0 is"),
        ({"loss": 3}, ConfigError, "loss is 3"),
        ({"dense": "model"}, ConfigError, "dense is 'model'"),
    ],
    ids=["steps", "empty", "generator", "nan", "shape", "loss", "dense"],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    dense = network()
    given: dict[str, Any] = {"dense": dense, "data": batches()} | options
    with pytest.raises(error, match=message):
        distill(pruned(dense), **given)
    with pytest.raises(StateError, match="not compiled"):
        distill(dense, network(), batches())
