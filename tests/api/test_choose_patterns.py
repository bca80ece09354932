"""Mixed N:M: the choice against brute force, its budget, and the config that it returns."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, NMPattern
from nmcompile.api.choose_patterns import spend
from nmcompile.api.compile import rewrite
from nmcompile.api.pattern_costs import COSTS, Pattern
from nmcompile.api.pattern_damages import measure_patterns
from nmcompile.api.request import request_of
from nmcompile.errors import CalibrationError, ConfigError
from tests.api.masked_outputs import MaskedOutputs

ENDS = CompileConfig(ends="sparse", masks="sparsegpt")
PATTERNS = ("1:4", "2:4", "4:8")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(40, 16, generator=generator) * torch.linspace(0.1, 3, 16) for _ in range(count)]


def choose(budget: float, **options: Any) -> CompileConfig:
    given: dict[str, Any] = {"patterns": PATTERNS, "calibration": batches(), "config": ENDS} | options
    return nmcompile.choose_patterns(network(), "weights", budget=budget, **given)


def patterns_of(config: CompileConfig) -> dict[str, str]:
    found = {name: None if layer is None else layer.weight for name, layer in config.layers.items()}
    return {name: "dense" if pruning is None else str(pruning.pattern) for name, pruning in found.items()}


def density(config: CompileConfig) -> float:
    sizes = {name: tensor.numel() for name, tensor in network().state_dict().items()}
    parts = {name: 1.0 if p == "dense" else NMPattern.parse(p).density for name, p in patterns_of(config).items()}
    return sum(sizes[name] * part for name, part in parts.items()) / sum(sizes[name] for name in parts)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.6, 0.8, 1.0])
def test_the_budget_holds_and_is_used(budget: float) -> None:
    chosen = density(choose(budget))
    assert chosen <= budget + 1e-9
    largest = 32 * 64 / (16 * 32 + 32 * 64 + 64 * 8)
    assert chosen > budget - largest / 2  # a step of the largest layer is a quarter or half of it


def test_everything_stays_dense_within_the_whole_budget() -> None:
    assert set(patterns_of(choose(1.0)).values()) == {"dense"}


def test_the_config_can_be_compiled_and_beats_one_pattern() -> None:
    """With a method that leaves every layer its own error: later layers do not make up for that of earlier ones."""
    wanda = CompileConfig(ends="sparse", masks="wanda")
    config = CompileConfig.from_json(choose(0.5, config=wanda).to_json())
    model, x = network(), batches()[0]
    mixed = nmcompile.compile(model, "weights", calibration=batches(), config=config)
    uniform = nmcompile.compile(model, "weights", calibration=batches(), config=wanda)
    assert nmcompile.verify(mixed).ok
    with torch.no_grad():
        assert (mixed(x) - model(x)).norm() <= (uniform(x) - model(x)).norm()


def test_bits_count_values_and_positions() -> None:
    """A 1:4 block of floats takes 32 + 2 bits of 128, a 2:4 block 64 + 3."""
    config = choose((32 + 2) / 128, cost="bits", patterns=("1:4",))
    assert set(patterns_of(config).values()) == {"1:4"}
    with pytest.raises(ConfigError, match=r"less than the cheapest patterns cost, 0\.266 of dense"):
        choose(0.26, cost="bits", patterns=("1:4",))


def test_time_is_that_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the layer that is faster with a pattern gets it when time is short."""

    def times(trial: nn.Module, args: object, kwargs: object) -> dict[str, dict[object, float]]:
        return {name: {(): 1.0, ("pruned",): 0.5 if name == "2" else 2.0} for name in ("0", "2", "4")}

    monkeypatch.setattr("nmcompile.api.pattern_costs.layer_times", times)
    config = choose(0.9, cost="time", patterns=("2:4",), args=(batches()[0],))
    assert patterns_of(config) == {"0.weight": "dense", "2.weight": "2:4", "4.weight": "dense"}


def test_time_is_measured_on_the_machine() -> None:
    config = choose(1.0, cost="time", patterns=("2:4",), args=(batches()[0],))
    assert set(patterns_of(config).values()) <= {"dense", "2:4"}


class Uncalled(nn.Module):
    """Its last layer runs on large batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.extra = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x)
        return self.extra(y) if len(x) > 4 else y


def test_layers_without_a_time_keep_their_pattern() -> None:
    given: dict[str, Any] = {"patterns": ("1:4",), "budget": 1.0, "calibration": batches(), "config": ENDS}
    config = nmcompile.choose_patterns(Uncalled(), cost="time", args=(batches()[0][:4],), **given)
    assert set(config.layers) == {"network.0.weight", "network.2.weight", "network.4.weight"}


def test_time_of_quantized_layers() -> None:
    given: dict[str, Any] = {"patterns": ("2:4",), "budget": 1.0, "calibration": batches(), "config": ENDS}
    config = nmcompile.choose_patterns(network(), "inference", cost="time", args=(batches()[0],), **given)
    assert set(patterns_of(config).values()) <= {"dense", "2:4"}


def tied() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU()]
    model = nn.Sequential(*layers, nn.Linear(32, 8))
    model[4].weight = model[2].weight
    return model


def times(trial: nn.Module, args: object, kwargs: object) -> dict[str, dict[object, float]]:
    return {name: {(): 1.0, ("pruned",): 0.3} for name in ("0", "2", "4", "6")}


@pytest.mark.parametrize("cost", ["macs", "bits", "time"])
@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_layers_that_share_a_weight_get_one_pattern(cost: str, budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmcompile.api.pattern_costs.layer_times", times)
    given: dict[str, Any] = {"patterns": ("1:4", "2:4", "3:4"), "budget": budget, "config": ENDS}
    config = nmcompile.choose_patterns(tied(), calibration=batches(), cost=cost, args=(batches()[0],), **given)
    found = patterns_of(config)
    assert found["2.weight"] == found["4.weight"]
    assert nmcompile.verify(nmcompile.compile(tied(), "weights", calibration=batches(), config=config)).ok


def test_a_shared_weight_is_priced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stored once, and both calls count their multiplications and their time."""
    request = request_of(tied(), "weights", (batches()[0],), None, ENDS, "auto")
    given = NMPattern.parse("2:4")
    measured = measure_patterns(rewrite(request), batches(), ENDS, [given])
    assert set(measured) == {"0.weight", "2.weight", "6.weight"}
    assert measured["2.weight"].elements == 32 * 32
    assert measured["2.weight"].macs == 2 * 32 * 32 * sum(map(len, batches()))
    monkeypatch.setattr("nmcompile.api.pattern_costs.layer_times", times)
    assert COSTS["time"](request, batches(), measured)["2.weight"] == {None: 2.0, given: 0.6}


def test_outputs_that_are_masked_with_an_infinity_do_not_count() -> None:
    request = request_of(MaskedOutputs(network()), "weights", None, None, ENDS, "auto")
    measured = measure_patterns(rewrite(request), batches(), ENDS, [NMPattern.parse("2:4")])
    assert all(0 < max(one.damages.values()) < 1 for one in measured.values())


def test_a_weight_that_is_pruned_in_some_calls_only_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.eye(16))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(nn.functional.linear(x, self.w).relu(), self.w)

    config = CompileConfig(ends="sparse", layers={"w.1": None})
    with pytest.raises(ConfigError, match=r"leaves layer 'w\.1' dense, but another call of 'w' is pruned"):
        nmcompile.choose_patterns(
            Twice(), "weights", patterns=["2:4"], budget=0.5, calibration=batches(), config=config
        )


def test_transposable_modes_keep_their_operator() -> None:
    config = nmcompile.choose_patterns(
        network(), "t-weights", patterns=("1:4", "2:4"), budget=0.4, calibration=batches(), config=ENDS
    )
    layers = [layer.weight for layer in config.layers.values() if layer and layer.weight]
    assert {pruning.operator for pruning in layers} == {"transposable"}
    compiled = nmcompile.compile(network(), "t-weights", calibration=batches(), config=config)
    assert nmcompile.verify(compiled).ok


def test_layers_that_a_pattern_does_not_divide_keep_the_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16))
    data = [x[:, :12] for x in batches()]
    config = nmcompile.choose_patterns(
        model, "weights", patterns=("2:4", "2:8"), budget=0.4, calibration=data, config=ENDS
    )
    assert patterns_of(config) == {"0.weight": "2:4", "2.weight": "2:8"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patterns": ()}, ConfigError, "patterns is empty"),
        ({"patterns": "2:4"}, ConfigError, "give a list of patterns"),
        ({"patterns": ("2-4",)}, ConfigError, "not of the form 'N:M'"),
        ({"cost": "flops"}, ConfigError, "cost 'flops' is unknown"),
        ({"budget": 0}, ConfigError, "budget is 0"),
        ({"budget": 0.1}, ConfigError, "less than the cheapest patterns cost, 0.250 of dense"),
        ({"cost": "time"}, ConfigError, "pass args="),
        ({"calibration": []}, CalibrationError, "empty"),
    ],
    ids=["none", "text", "form", "cost", "zero", "little", "args", "data"],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose(**{"budget": 0.5} | options)


@pytest.mark.parametrize("seed", range(40))
def test_choice_is_the_optimum_or_one_step_from_it(seed: int) -> None:
    """Against brute force over all choices, with damages that grow as prices fall, or do not."""
    generator = torch.Generator().manual_seed(seed)
    patterns: list[Pattern] = [None, NMPattern.parse("4:8"), NMPattern.parse("1:4")]

    def draw() -> dict[Pattern, float]:
        return dict(zip(patterns, torch.rand(3, generator=generator).tolist(), strict=True))

    damages = {name: draw() | {None: 0.0} for name in "abcd"}
    prices = {name: draw() | {None: 1.0} for name in "abcd"}
    share = 0.4 + 0.5 * float(torch.rand((), generator=generator))
    cheapest = sum(min(one.values()) for one in prices.values())
    if cheapest > share * 4:
        with pytest.raises(ConfigError):
            spend(damages, prices, share)
        return
    chosen = spend(damages, prices, share)
    assert sum(prices[n][p] for n, p in chosen.items()) <= share * 4 + 1e-9
    choices = (dict(zip("abcd", c, strict=True)) for c in itertools.product(patterns, repeat=4))
    best = min(
        sum(damages[n][p] for n, p in one.items())
        for one in choices
        if sum(prices[n][p] for n, p in one.items()) <= share * 4
    )
    step = max(max(one.values()) for one in damages.values())
    assert best <= sum(damages[n][p] for n, p in chosen.items()) + 1e-9
    assert sum(damages[n][p] for n, p in chosen.items()) <= best + step
