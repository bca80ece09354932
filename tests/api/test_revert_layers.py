"""Accuracy control reverts the layers that hurt; `compare` shows where the error arises."""

import math

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.api.compare import compare
from nmcompile.api.revert_layers import revert_layers
from nmcompile.errors import ConfigError

COST = {"a": 0.05, "b": 0.3, "c": 0.01, "d": 0.1}


class Scored(nn.Module):
    """A model whose score falls by a known cost for each layer that is not reverted."""

    def __init__(self, reverted: tuple[str, ...]) -> None:
        super().__init__()
        self.reverted = reverted
        self.score = 1 - sum(cost for name, cost in COST.items() if name not in reverted)


@pytest.mark.parametrize(
    ("max_drop", "expected"),
    [(0.5, ()), (0.2, ("b",)), (0.07, ("b", "d")), (0.02, ("b", "d", "a")), (0.0, ("b", "d", "a", "c"))],
)
def test_the_costliest_layers_are_reverted(max_drop: float, expected: tuple[str, ...]) -> None:
    found = revert_layers(1.0, list(COST), Scored, lambda model: float(model.score), max_drop)  # type: ignore[arg-type]
    assert found.layers == expected
    assert found.dense - found.compiled <= max_drop + 1e-9


def test_a_score_that_is_no_number_never_holds() -> None:
    """The layer that causes it is reverted first."""

    def score(model: nn.Module) -> float:
        assert isinstance(model, Scored)
        return float(model.score) if "d" in model.reverted else math.nan

    assert revert_layers(1.0, list(COST), Scored, score, 0.5).layers == ("d",)
    with pytest.raises(ConfigError, match="NaN for the dense model"):
        revert_layers(math.nan, list(COST), Scored, score, 0.5)
    with pytest.raises(ConfigError, match="NaN or -inf even with every layer dense"):
        revert_layers(1.0, list(COST), Scored, lambda model: math.nan, 0.5)


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(16, 16), nn.ReLU())), nn.Linear(16, 4))


X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inplace", [False, True])
def test_the_drop_holds_and_the_report_lists_what_was_reverted(net: nn.Sequential, inplace: bool) -> None:
    with torch.no_grad():
        expected = net(X)

    @torch.no_grad()
    def validation(model: nn.Module) -> float:
        return -float((model(X) - expected).norm() / expected.norm())

    config = CompileConfig(ends="sparse")
    plain = nmcompile.compile(net, "inference", args=(X,), config=config, calibration=[X])
    limit = -0.5 * validation(plain)
    controlled = nmcompile.compile(
        net, "inference", args=(X,), config=config, calibration=iter([X]), validation=validation, max_drop=limit,
        inplace=inplace,
    )  # fmt: skip
    report = nmcompile.inspect(controlled)
    assert -validation(controlled) <= limit < -validation(plain)
    assert report.reverted is not None and 0 < len(report.reverted.layers) < 5
    assert all(not report.layer(name).plan.rewritten for name in report.reverted.layers)
    assert report.reverted.layers[0] in str(report).split("reverted for accuracy")[1]


def test_validation_and_max_drop_go_together(net: nn.Sequential) -> None:
    with pytest.raises(ConfigError, match="go together"):
        nmcompile.compile(net, max_drop=0.1)
    for limit in (-1, math.nan):
        with pytest.raises(ConfigError, match=f"max_drop is {limit}"):
            nmcompile.compile(net, validation=lambda model: 0.0, max_drop=limit)


def snr(dense: Tensor, other: Tensor) -> float:
    return 10 * math.log10(float(dense.double().square().sum() / (dense.double() - other.double()).square().sum()))


@torch.no_grad()
def test_compare_measures_each_layer(net: nn.Sequential) -> None:
    config = CompileConfig(ends="sparse")
    model = nmcompile.compile(net, "inference", args=(X,), config=config, calibration=[X]).eval()
    found = {layer.layer: layer for layer in compare(net, model, X).layers}
    assert list(found) == ["0", "2", "4", "6", "8"]
    assert found["0"].sqnr == pytest.approx(snr(net[0](X), model[0](X)), abs=1e-3)  # type: ignore[index]
    assert found["8"].sqnr == pytest.approx(snr(net(X), model(X)), abs=1e-3)
    cosine = torch.cosine_similarity(net(X).flatten().double(), model(X).flatten().double(), dim=0)
    assert found["8"].cosine == pytest.approx(float(cosine), abs=1e-6)


def test_compare_needs_a_shared_layer(net: nn.Sequential) -> None:
    other = nmcompile.compile(nn.Sequential(nn.Sequential(nn.Linear(16, 4))), "dense")
    with pytest.raises(ConfigError, match="no layer"):
        compare(net, other, X)
