"""FATReLU: thresholds are quantiles, the change of the outputs is bounded, and 4:8 finds more zeros."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile.errors import CalibrationError, ConfigError
from tests.api.masked_outputs import MaskedOutputs


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32 * 16, 8)
    )


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(3)]


def thresholds(model: nn.Module) -> list[float]:
    return [module.threshold for module in model.modules() if isinstance(module, nn.Threshold)]


@torch.no_grad()
def change(model: nn.Module, other: nn.Module) -> float:
    pairs = [(model(x), other(x)) for x in batches()]
    lost = sum(float((a - b).square().sum()) for a, b in pairs)
    return float((lost / sum(float(a.square().sum()) for a, _ in pairs)) ** 0.5)


@pytest.mark.parametrize("bound", [0.02, 0.1, 0.3])
def test_the_change_is_bounded_and_used(bound: float) -> None:
    model = network()
    changed = nmcompile.fatrelu(model, batches(), max_change=bound)
    assert change(model, changed) <= bound
    assert len(thresholds(changed)) == 2 and min(thresholds(changed)) > 0
    assert not thresholds(model)


def test_a_higher_bound_drops_more() -> None:
    low, high = (thresholds(nmcompile.fatrelu(network(), batches(), max_change=bound)) for bound in (0.02, 0.3))
    assert all(a < b for a, b in zip(low, high, strict=True))


def test_one_share_of_the_positive_values_is_dropped_everywhere() -> None:
    model = network()
    changed = nmcompile.fatrelu(model, batches(), max_change=0.2)
    with torch.no_grad():
        first = torch.cat([model[1](model[0](x)).flatten() for x in batches()])
        second = torch.cat([model[3](model[2](model[1](model[0](x)))).flatten() for x in batches()])
    shares = [
        float(((values > 0) & (values <= threshold)).sum() / (values > 0).sum())
        for values, threshold in zip((first, second), thresholds(changed), strict=True)
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.01)
    assert shares[0] == pytest.approx(round(shares[0] * 20) / 20, abs=0.01)


def test_fewer_values_are_left_for_4_of_8_to_prune() -> None:
    model = network()
    changed = nmcompile.fatrelu(model, batches(), max_change=0.2)

    def pruned_by_4_of_8(one: Any) -> float:
        x = one[1](one[0](batches()[0])).detach()
        kept = nmcompile.pruning.greedy_by_value(x, "4:8", dim=1)
        return float((x != kept).sum() / (x != 0).sum())

    assert pruned_by_4_of_8(changed) < pruned_by_4_of_8(model)


def test_the_result_is_pruned_by_value() -> None:
    """A threshold at or above zero is proven non-negative, so the plan prunes its readers as after a ReLU."""
    changed = nmcompile.fatrelu(network(), batches(), max_change=0.1)
    report = nmcompile.analyze(changed, "activations", args=(batches()[0],))
    assert report.layer("2").status == "sparse"
    compiled = nmcompile.compile(changed, "inference", args=(batches()[0],), calibration=batches())
    compiled(batches()[0])
    assert nmcompile.inspect(compiled).layer("2").status == "sparse"


def test_inplace_edits_the_model_and_keeps_the_flag() -> None:
    model = network()
    assert nmcompile.fatrelu(model, batches(), max_change=0.1, inplace=True) is model
    assert [module.inplace for module in model.modules() if isinstance(module, nn.Threshold)] == [False, True]


def test_a_relu_that_is_used_twice_becomes_one_threshold() -> None:
    torch.manual_seed(0)
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(16, 32), act, nn.Linear(32, 32), act, nn.Linear(32, 8))
    data = [torch.randn(8, 16) for _ in range(3)]
    for inplace in (False, True):
        changed: Any = nmcompile.fatrelu(model, data, max_change=0.3, inplace=inplace)
        assert isinstance(changed[1], nn.Threshold) and changed[3] is changed[1]
        assert (model[1] is act) is not inplace
        with torch.no_grad():
            assert (changed(data[0]) - nn.Sequential(model[0], act, model[2], act, model[4])(data[0])).norm() > 0


@pytest.mark.parametrize("training", [False, True])
def test_thresholds_have_the_mode_of_their_relus(training: bool) -> None:
    changed = nmcompile.fatrelu(network().train(training), batches(), max_change=0.2)
    assert thresholds(changed) and all(module.training is training for module in changed.modules())


def test_outputs_that_are_masked_with_an_infinity_do_not_count() -> None:
    model = MaskedOutputs(network())
    changed = nmcompile.fatrelu(model, batches(), max_change=0.05)
    assert thresholds(changed)
    with torch.no_grad():
        pairs = [(model(x)[:, 1:], changed(x)[:, 1:]) for x in batches()]
    lost = sum(float((a - b).square().sum()) for a, b in pairs)
    assert lost <= 0.05**2 * sum(float(a.square().sum()) for a, _ in pairs)


def test_nothing_changes_if_nothing_may() -> None:
    changed = nmcompile.fatrelu(network(), batches(), max_change=0.0)
    assert [type(one) for one in changed.children()] == [type(one) for one in network()]
    assert change(network(), changed) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Sequential(nn.Linear(2, 2)), [torch.zeros(1, 2)]), ConfigError, r"no nn\.ReLU"),
        ((network(), []), CalibrationError, "empty"),
        ((network(), torch.zeros(1, 3, 8, 8)), CalibrationError, "give an iterable of batches"),
        ((network(), [torch.zeros(1, 2, 8, 8)]), CalibrationError, "calibration batch 0 is"),
        ((network(), [torch.full((1, 3, 8, 8), torch.nan)]), CalibrationError, "module '1': calibration batch 0 gives"),
        ((nmcompile.compile(network(), "weights"), batches()), ConfigError, "before compile"),
    ],
    ids=["relu", "empty", "tensor", "shape", "nan", "compiled"],
)
def test_bad_arguments(arguments: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nmcompile.fatrelu(*arguments)
