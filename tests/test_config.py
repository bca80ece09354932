"""Configuration: presets, overrides by name and their precedence, JSON."""

import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest

from nmcompile import CompileConfig, LayerConfig, NMPattern, Pruning, presets
from nmcompile.config import preset
from nmcompile.errors import ConfigError

A, B, C, D, E = (LayerConfig(weight=Pruning("greedy", NMPattern(n, 8))) for n in range(1, 6))

TABLE_1: dict[str, dict[str, tuple[str, str]]] = {
    "dense": {},
    "weights": {"weight": ("greedy", "2:4")},
    "t-weights": {"weight": ("transposable", "2:4")},
    "activations": {"input": ("greedy_by_value", "4:8")},
    "gradients": {"update_gradient": ("mvue", "1:2")},
    "training": {"weight": ("transposable", "2:4"), "update_gradient": ("mvue", "2:4")},
    "inference": {"weight": ("greedy", "2:4"), "input": ("greedy_by_value", "4:8")},
}
"""The paper's Table 1: which tensor is pruned, by the least square error (greedy) or without bias (mvue)."""

BAD_JSON: dict[str, tuple[str, str]] = {
    "option": ('{"refesh": 3}', "'refresh'"),
    "operand": ('{"layers": {"fc": {"weigth": null}}}', "'weight'"),
    "pruning key": ('{"layers": {"fc": {"weight": {"operator": "greedy", "patern": "2:4"}}}}', "'pattern'"),
    "missing key": ('{"layers": {"fc": {"weight": {"operator": "greedy"}}}}', "pattern"),
    "pattern": ('{"layers": {"fc": {"weight": {"operator": "greedy", "pattern": "2of4"}}}}', "N:M"),
    "operator": ('{"layers": {"fc": {"weight": {"operator": "gredy", "pattern": "2:4"}}}}', "'greedy'"),
    "no JSON": ("{", "not JSON"),
    "no object": ("[]", "JSON object"),
    "no layers": ('{"layers": 3}', "layers"),
    "no layer": ('{"layers": {"fc": 3}}', "LayerConfig"),
    "a key twice": ('{"refresh": 1, "refresh": 2}', "'refresh' occurs twice"),
    "NaN": ('{"sr_ste": NaN}', "not a JSON number"),
    "depth": ("[" * 10**5, "not JSON"),
    "digits": (f'{{"refresh": {"9" * 5000}}}', "5000 digits"),
    "truth": ('{"refresh": true}', "refresh is True"),
    "large block": ('{"layers": {"fc": {"weight": {"operator": "greedy", "pattern": "1:2000"}}}}', "N < M <= 1024"),
}


@pytest.mark.parametrize("mode", TABLE_1)
def test_presets_are_table_1(mode: str) -> None:
    pruned = {f.name: getattr(presets[mode], f.name) for f in fields(LayerConfig)}
    found = {name: (p.operator, str(p.pattern)) for name, p in pruned.items() if isinstance(p, Pruning)}
    assert found == TABLE_1[mode]
    bits = 4 if mode == "inference" else None
    assert pruned["weight_bits"] == pruned["input_bits"] == bits


def test_there_are_no_other_presets() -> None:
    assert set(presets) == set(TABLE_1)


LADDER: list[tuple[str, LayerConfig | None]] = [
    ("block.fc.weight", A),
    ("block.fc", None),
    ("re:.*fc\\.weight", B),
    ("re:.*fc", C),
    ("_default", D),
]
"""Every key that applies to the layer `block.fc`, the strongest first."""


@pytest.mark.parametrize("strongest", range(len(LADDER)))
@pytest.mark.parametrize("backwards", [False, True])
def test_precedence(strongest: int, backwards: bool) -> None:
    """Exact weight, exact layer, pattern of the weight, pattern of the layer, default, in any order of the entries."""
    entries = LADDER[strongest:]
    config = CompileConfig(layers=dict(reversed(entries) if backwards else entries))
    assert config.lookup("block.fc", "block.fc.weight") == LADDER[strongest]


def test_first_matching_pattern_wins() -> None:
    config = CompileConfig(layers={"re:.*": A, "re:fc": B})
    assert config.lookup("fc", "fc.weight") == ("re:.*", A)
    assert CompileConfig(layers={"re:f.": B, "re:fc": A}).lookup("fc", "fc.weight") == ("re:f.", B)


@pytest.mark.parametrize("key", ["re:fc", "re:block", "re:fc.*", "fc", "block.fc.bias"])
def test_names_and_patterns_match_whole_names(key: str) -> None:
    assert CompileConfig(layers={key: A}).lookup("block.fc", "block.fc.weight") is None


def test_nothing_said_is_not_the_same_as_dense() -> None:
    assert CompileConfig().lookup("fc", "fc.weight") is None
    assert CompileConfig(layers={"fc": None}).lookup("fc", "fc.weight") == ("fc", None)


@pytest.mark.parametrize("key", ["fc1", "fc1.weight", "re:fc\\d", "_default"])
def test_names_that_exist_pass(key: str) -> None:
    CompileConfig(layers={key: A}).check_names([("fc1", "fc1.weight"), ("fc2", "fc2.weight")])


@pytest.mark.parametrize("key", ["fc3", "fc1.weigth", "re:fx1"])
def test_names_that_do_not_exist_are_errors_with_the_nearest(key: str) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'fc\d") as caught:
        CompileConfig(layers={key: A}).check_names([("fc1", "fc1.weight"), ("fc2", "fc2.weight")])
    assert repr(key) in str(caught.value)


CONFIGS = [
    CompileConfig(),
    CompileConfig(refresh=None, sr_ste=2e-4, ends="sparse"),
    CompileConfig(layers={"fc": None, "re:.*": E, "_default": presets["training"]}),
    CompileConfig(layers={"fc": LayerConfig(update_gradient=Pruning("mvue", NMPattern(1, 2), group="batch"))}),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip(config: CompileConfig) -> None:
    text = config.to_json()
    assert CompileConfig.from_json(text) == config
    assert set(json.loads(text)) == {f.name for f in fields(CompileConfig)}
    assert list(CompileConfig.from_json(text).layers) == list(config.layers)


def test_empty_json_is_the_default() -> None:
    assert CompileConfig.from_json("{}") == CompileConfig()


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_an_error_that_says_what(case: str) -> None:
    text, hint = BAD_JSON[case]
    with pytest.raises(ConfigError) as caught:
        CompileConfig.from_json(text)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"refresh": 0}, {"sr_ste": -1.0}, {"ends": "dens"}, {"layers": {"re:(": A}}, {"layers": {"fc": "2:4"}}]
)
def test_bad_values_are_errors_that_name_the_field(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        CompileConfig(**values)
    assert next(iter(values)) in str(caught.value)


REGEXES = (
    "(",
    "(?L)a",
    "a{1,99999999999}",
    f"a{{{'9' * 5000}}}",
    "(" * 5000 + ")" * 5000,
    "[",
    "(?P<a>)(?P<a>)",
    "\\1",
    "*",
)
"""Patterns that `re` refuses with its own error, ValueError, OverflowError and RecursionError."""


@pytest.mark.parametrize("pattern", REGEXES)
def test_whatever_re_refuses_is_an_error_that_names_the_key(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"'re:.*in CompileConfig\.layers is not a regular expression: .+"):
        CompileConfig(layers={f"re:{pattern}": None})
    with pytest.raises(ConfigError, match=r"is not a regular expression"):
        CompileConfig.from_json(json.dumps({"layers": {f"re:{pattern}": None}}))


@pytest.mark.parametrize("name", ["re:x", "re:x.weight", "_default"])
def test_names_that_read_as_rules_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"named '{name}'.*rename it"):
        CompileConfig().check_names([("fc", "fc.weight"), (name, "w.weight")])


WRONG_KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]] = {
    "ends": (CompileConfig, {"ends": None}, ("ends is None", "one of dense, sparse, int8")),
    "clip": (CompileConfig, {"clip": ["mse"]}, ("clip is of type list", "one of mse, percentile, pact")),
    "refresh text": (CompileConfig, {"refresh": "40"}, ("refresh is '40'", "optimizer steps >= 1, or None")),
    "refresh fraction": (CompileConfig, {"refresh": 1.5}, ("refresh is 1.5", "optimizer steps >= 1, or None")),
    "sr_ste nan": (CompileConfig, {"sr_ste": math.nan}, ("sr_ste is nan", "finite number >= 0")),
    "sr_ste infinite": (CompileConfig, {"sr_ste": math.inf}, ("sr_ste is inf", "finite number >= 0")),
    "sr_ste text": (CompileConfig, {"sr_ste": "x"}, ("sr_ste is 'x'", "finite number >= 0")),
    "layers": (CompileConfig, {"layers": ["fc"]}, ("CompileConfig.layers is of type list", "a dict")),
    "layer name": (CompileConfig, {"layers": {0: None}}, ("key of CompileConfig.layers is 0", "'0'")),
    "operand text": (LayerConfig, {"weight": "2:4"}, ("LayerConfig.weight is '2:4'", "Pruning('greedy', '2:4')")),
    "operand pattern": (LayerConfig, {"input": NMPattern(2, 4)}, ("LayerConfig.input", "NMPattern", "a Pruning")),
    "bits text": (LayerConfig, {"weight_bits": "4"}, ("weight_bits is '4'", "one of the numbers 2, 3, 4, 8")),
    "bits fraction": (LayerConfig, {"input_bits": 4.0}, ("input_bits is 4.0", "one of the numbers 2, 3, 4, 8")),
    "bits": (LayerConfig, {"input_bits": 5}, ("LayerConfig.input_bits asks for 5 bits", "no grid", "one of the")),
    "pattern tuple": (Pruning, {"operator": "greedy", "pattern": (2, 4)}, ("pattern of type tuple", "'2:4'")),
    "pattern of texts": (NMPattern, {"n_keep": "2", "block": "4"}, ("pattern '2':'4'", "1 <= N < M")),
    "operator": (Pruning, {"operator": None, "pattern": "2:4"}, ("Pruning.operator is None", "greedy")),
    "group": (Pruning, {"operator": "mvue", "pattern": "2:4", "group": None}, ("group is None", "auto, batch, flat")),
    "mode": (preset, {"mode": None}, ("mode is None", "one of dense, weights, t-weights")),
    "JSON": (CompileConfig.from_json, {"text": '{"refresh": "a"}'}, ("refresh is 'a'", "optimizer steps")),
}


@pytest.mark.parametrize("case", WRONG_KINDS)
def test_values_of_another_kind_are_errors_that_say_what_to_give(case: str) -> None:
    act, values, fragments = WRONG_KINDS[case]
    with pytest.raises(ConfigError) as caught:
        act(**values)
    assert [text for text in fragments if text not in str(caught.value)] == []


def test_numbers_of_numpy_are_numbers() -> None:
    config = CompileConfig(refresh=np.int64(8), sr_ste=np.float32(0.5))  # type: ignore[arg-type]
    assert (config.refresh, config.sr_ste) == (8, 0.5) and CompileConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("operand", "operator"), [("weight", "mvue"), ("input", "transposable"), ("update_gradient", "greedy_by_value")]
)
def test_operators_belong_to_operands(operand: str, operator: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LayerConfig(**{operand: Pruning(operator, NMPattern(2, 4))})  # type: ignore[arg-type]
    assert operand in str(caught.value) and operator in str(caught.value)


def test_unknown_group_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'batch'"):
        Pruning("mvue", NMPattern(2, 4), group="bacth")  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", [CompileConfig(), A, Pruning("greedy", NMPattern(2, 4)), NMPattern(2, 4)])
def test_frozen(frozen: Any) -> None:
    name = fields(frozen)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(frozen, name, None)
    assert replace(frozen) == frozen


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        presets["training"] = LayerConfig()  # type: ignore[index]
