"""Delta debugging against brute force, and the layers that break checks of small nets."""

import itertools
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig, NMPattern, Pruning
from nmcompile.api.bisect import Unit
from nmcompile.api.delta_debugging import minimal
from nmcompile.cli import cli
from nmcompile.errors import ConfigError

X = torch.randn(8, 16)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*layers)


def subsets(units: range) -> list[frozenset[int]]:
    return [frozenset(one) for size in range(len(units) + 1) for one in itertools.combinations(units, size)]


def traps(seed: int) -> list[frozenset[int]]:
    """Return sets of units that break something together: leaving one of each out mends it."""
    dice = random.Random(seed)
    return [frozenset(dice.sample(range(7), dice.randint(1, 3))) for _ in range(dice.randint(1, 4))]


@pytest.mark.parametrize("seed", range(60))
def test_the_result_holds_and_is_minimal_by_brute_force(seed: int) -> None:
    broken, units = traps(seed), range(7)

    def holds(left_out: frozenset[int]) -> bool:
        return all(trap & left_out for trap in broken)

    found = frozenset(minimal(units, holds))
    minima = [one for one in subsets(units) if holds(one) and not any(holds(one - {unit}) for unit in one)]
    assert found in minima
    if all(len(trap) == 1 for trap in broken):
        assert minima == [found]


@pytest.mark.parametrize("seed", range(30))
def test_any_property_gives_a_set_without_a_needless_unit(seed: int) -> None:
    """Also one for which more is not better: each set holds or not by chance."""
    dice = random.Random(seed)
    table = {one: dice.random() < 0.3 for one in subsets(range(6))} | {frozenset(range(6)): True}
    found = frozenset(minimal(range(6), table.__getitem__))
    assert table[found] and not any(table[found - {unit}] for unit in found)


@pytest.mark.parametrize("count", [1, 2, 3, 100, 1000])
def test_one_unit_among_many_takes_few_trials(count: int) -> None:
    for culprit in {0, count // 3, count - 1}:
        trials: list[frozenset[int]] = []

        def holds(left_out: frozenset[int], culprit: int = culprit, trials: Any = trials) -> bool:
            trials.append(left_out)
            return culprit in left_out

        assert minimal(range(count), holds) == (culprit,)
        assert len(trials) <= 2 * math.ceil(math.log2(count)) + 2 and len(set(trials)) == len(trials)


def is_pruned(model: nn.Module, layer: str) -> bool:
    """Return whether half of the weights are zero, which rounding to a grid of 4 bits does not make them."""
    return float((nmcompile.finalize(model).get_parameter(f"{layer}.weight") == 0).double().mean()) >= 0.5


LAYERS = [f"{i}.0" for i in range(4)]


@pytest.mark.parametrize("culprits", [(), ("1.0",), ("0.0", "3.0"), tuple(LAYERS)])
def test_layers_that_break_a_check_are_found(culprits: tuple[str, ...]) -> None:
    model, seen = net(), list[nn.Module]()

    def check(compiled: nn.Module) -> bool:
        seen.append(compiled)
        return not any(is_pruned(compiled, name) for name in culprits)

    config = CompileConfig(ends="sparse")
    found = nmcompile.bisect(model, check, "weights", args=(X,), config=config)
    assert {unit.layer for unit in found.culprits} == set(culprits) and found.trials == len(seen)
    assert found.config.layers == dict.fromkeys(culprits)
    assert check(nmcompile.compile(model, "weights", args=(X,), config=found.config))


def test_pruning_and_quantization_are_told_apart() -> None:
    model, x = net(), torch.relu(X)
    both = LayerConfig(weight=Pruning("greedy", NMPattern(2, 4)), weight_bits=4)
    config = CompileConfig(layers={"_default": both}, ends="sparse")

    def on_grid(model: nn.Module, layer: str) -> bool:
        return len(nmcompile.finalize(model).get_parameter(f"{layer}.weight").unique()) <= 16

    def check(compiled: nn.Module) -> bool:
        assert not is_pruned(compiled, "1.0")
        return not on_grid(compiled, "2.0")

    found = nmcompile.bisect(model, check, "dense", args=(x,), config=config)
    assert set(found.culprits) == {Unit("1.0", "pruning"), Unit("2.0", "quantization")}
    compiled = nmcompile.compile(model, "dense", args=(x,), config=found.config)
    assert on_grid(compiled, "1.0") and is_pruned(compiled, "2.0") and check(compiled)
    assert "1.0: pruning" in str(found) and "2.0: quantization" in str(found)


def test_an_entry_for_a_weight_does_not_hide_that_its_layer_is_left_out() -> None:
    entry = LayerConfig(weight=Pruning("greedy", NMPattern(2, 4)))
    config = CompileConfig(layers={"1.0.weight": entry, "2.0.weight": entry}, ends="sparse")
    found = nmcompile.bisect(net(), lambda one: not is_pruned(one, "1.0"), "weights", args=(X,), config=config)
    assert found.culprits == (Unit("1.0", "pruning"),)
    compiled = nmcompile.compile(net(), "weights", args=(X,), config=found.config)
    assert not is_pruned(compiled, "1.0") and is_pruned(compiled, "2.0")


def test_layers_in_mode_inference_keep_what_the_plan_does() -> None:
    """Not each layer's input can be pruned; what is left of a layer asks for no more than the plan carried out."""
    model = net().eval()

    def check(compiled: nn.Module) -> bool:
        return not is_pruned(compiled, "0.0") and not is_pruned(compiled, "2.0")

    config = CompileConfig(ends="sparse")
    found = nmcompile.bisect(model, check, "inference", args=(X,), config=config, calibration=[X])
    assert set(found.culprits) == {Unit("0.0", "pruning"), Unit("2.0", "pruning")} and found.units == 8


def test_the_check_may_train_its_model() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def check(compiled: nn.Module) -> bool:
        with torch.no_grad():
            for parameter in compiled.parameters():
                parameter.zero_()
        return False

    with pytest.raises(ConfigError, match="even with nothing pruned"):
        nmcompile.bisect(model, check, args=(X,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_mode_that_does_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to search"):
        nmcompile.bisect(net(), lambda _: False, "dense", args=(X,))


def test_other_errors_of_the_check_come_through() -> None:
    def check(compiled: nn.Module) -> bool:
        raise KeyError("labels")

    with pytest.raises(KeyError, match="labels"):
        nmcompile.bisect(net(), check, args=(X,))


MODELS = """
from torch import nn

def build():
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))

def good(model):
    return not type(model[2]).__name__.startswith("ThreeGemm")
"""
COMMAND = "import json, sys; sys.exit('2' not in json.load(open(sys.argv[1]))['layers'])"


@pytest.mark.parametrize("how", ["--check", "--command"])
def test_the_command_takes_a_function_or_a_command(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"bisect_models{how[2:]}.py").write_text(MODELS)
    (tmp_path / "check.py").write_text(COMMAND)
    monkeypatch.syspath_prepend(tmp_path)
    module, out = f"bisect_models{how[2:]}", tmp_path / "passes.json"
    given = f"{module}:good" if how == "--check" else f"{sys.executable} {tmp_path / 'check.py'} {{config}}"
    line = ["bisect", f"{module}:build", how, given, "--mode", "weights", "--json", "--out", str(out)]
    data = json.loads(CliRunner().invoke(cli, line, catch_exceptions=False).output)
    assert data["culprits"] == [{"layer": "2", "what": "pruning"}] and data["schema_version"] == 1
    config = CompileConfig.from_json(out.read_text())
    assert config.layers == {"2": None} and json.loads(config.to_json()) == data["config"]


WRONG = {
    "neither": ((), "--check and --command"),
    "both": (("--check", "a:b", "--command", "true"), "--check and --command"),
    "no program": (("--command", "/nowhere/at/all {config}"), "cannot be run"),
    "a quotation without end": (("--command", "sh -c 'test {config}"), "cannot be run"),
    "no place for the config": (("--command", "true"), "{config}"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_checks_are_refused(case: str) -> None:
    words, told = WRONG[case]
    error = CliRunner().invoke(cli, ["bisect", "nmcompile.demo.resnet:build", *words]).exception
    assert isinstance(error, ConfigError) and told in str(error)


def test_a_config_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    line = ["bisect", "nmcompile.demo.resnet:build", "--command", "true {config}", "--config"]
    error = CliRunner().invoke(cli, [*line, str(tmp_path / "config.json")]).exception
    assert isinstance(error, ConfigError) and "not JSON" in str(error)
