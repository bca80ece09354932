"""Plans: what they prune by default, what they leave dense and why, and what a configuration changes."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmcompile
from nmcompile.capture import capture_model
from nmcompile.config import CompileConfig, Phase, preset, presets
from nmcompile.errors import ConfigError, PreconditionError
from nmcompile.ir.plan import LayerPlan
from nmcompile.layer_config import LayerConfig, Pruning
from nmcompile.planning.plan_phases import NOT_ASKED, plan_phases
from nmcompile.pruning import NMPattern

FIRST = "first layer, not pruned (paper §6.1); CompileConfig(ends='sparse') changes that"
LAST = "last linear, not pruned (paper §6.4); CompileConfig(ends='sparse') changes that"
DEPTHWISE = "depthwise convolution: one in-channel per group leaves nothing to prune along"
UNPROVEN = "its input is not proven non-negative, so it is not pruned by value"
ROW_WISE = "a row-wise mask is not N:M along out: dense on the masked weight"
SPARSE = CompileConfig(ends="sparse")
SDGP = LayerConfig(backward_gradient=Pruning("sdgp", NMPattern(2, 4)))
IMAGE = torch.randn(2, 4, 6, 6)
TOKENS = torch.randn(2, 8)


class Opaque(nn.Sequential):
    """A module that no tracer follows, so nothing is known about the data flow."""

    def forward(self, input: Tensor) -> Tensor:
        for one in self:
            input = one(input) if float(input.sum()) == float(input.sum()) else -one(input)
        return input


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.fc(self.embed(ids)))
        return logits


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x @ self.fc.weight)
        return y


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 8)
    )


def plan(
    model: nn.Module, mode: str | LayerConfig, config: CompileConfig | None = None, *args: Tensor
) -> dict[str, LayerPlan]:
    default = mode if isinstance(mode, LayerConfig) else preset(mode)
    captured = capture_model(model, args or None)
    return {one.layer.name: one for one in plan_phases(captured, default, config or CompileConfig())}


def reasons(one: LayerPlan) -> set[str]:
    return {row.reason for row in one.rows}


def rows(one: LayerPlan) -> dict[str, str]:
    """Return by phase the rows in words, or why the GEMM runs dense."""
    return {row.phase.value: str(row) if row.is_sparse else row.reason for row in one.rows}


@pytest.mark.parametrize(
    ("mode", "forward", "backward", "update"),
    [
        ("dense", NOT_ASKED, NOT_ASKED, NOT_ASKED),
        ("weights", "weight 2:4 greedy along in", ROW_WISE, NOT_ASKED),
        ("t-weights", "weight 2:4 transposable along in", "weight 2:4 transposable along out", NOT_ASKED),
        ("activations", "input 4:8 greedy_by_value along in", NOT_ASKED, NOT_ASKED),
        ("gradients", NOT_ASKED, NOT_ASKED, "grad_output 1:2 mvue along auto"),
        (
            "training",
            "weight 2:4 transposable along in",
            "weight 2:4 transposable along out",
            "grad_output 2:4 mvue along auto",
        ),
    ],
)
def test_each_mode_is_its_row_of_table_1(mode: str, forward: str, backward: str, update: str) -> None:
    for layer in ("2", "5"):
        planned = plan(net(), mode)[layer]
        assert rows(planned) == {"forward": forward, "backward": backward, "update": update}
        assert planned.rewritten


@pytest.mark.parametrize("args", [(), (IMAGE,)], ids=["fx", "export"])
@pytest.mark.parametrize("mode", [mode for mode in presets if mode != "dense"])
def test_ends_stay_dense(mode: str, args: tuple[Tensor, ...]) -> None:
    planned = plan(net(), mode, None, *args)
    assert {name: reasons(one) for name, one in planned.items() if not one.rewritten} == {"0": {FIRST}, "6": {LAST}}


@pytest.mark.parametrize("args", [(), (IMAGE,)], ids=["fx", "export"])
def test_ends_are_pruned_on_request(args: tuple[Tensor, ...]) -> None:
    assert all(one.rewritten for one in plan(net(), "training", SPARSE, *args).values())


def test_dense_mode_rewrites_the_ends_too() -> None:
    assert all(one.rewritten and reasons(one) == {NOT_ASKED} for one in plan(net(), "dense").values())


@pytest.mark.parametrize(
    ("channels", "width", "dense"),
    [(4, 4, {"0": FIRST, "2": LAST}), (8, 4, {"2": LAST}), (4, 8, {"0": FIRST}), (8, 8, {})],
)
def test_without_a_whole_graph_few_channels_and_a_changed_width_make_the_ends(
    channels: int, width: int, dense: dict[str, str]
) -> None:
    model = Opaque(nn.Conv1d(channels, 8, 1), nn.ReLU(), nn.Linear(8, width))
    planned = plan(model, "training")
    assert {name: reasons(one) for name, one in planned.items() if not one.rewritten} == {
        name: {reason} for name, reason in dense.items()
    }


def test_with_a_whole_graph_the_ends_do_not_depend_on_widths() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Linear(8, 8))
    planned = plan(model, "training", None, torch.randn(2, 8, 8))
    assert {name: reasons(one) for name, one in planned.items()} == {"0": {FIRST}, "2": {LAST}}


def test_a_first_linear_is_known_by_the_whole_graph_only() -> None:
    layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16)
    assert reasons(plan(nn.Sequential(*layers), "training", None, TOKENS)["0"]) == {FIRST}
    assert plan(Opaque(*layers), "training")["0"].rewritten


@pytest.mark.parametrize("args", [(), (IMAGE,)], ids=["fx", "export"])
@pytest.mark.parametrize("mode", ["weights", "training", "gradients", "activations"])
def test_depthwise_convolutions_stay_dense(mode: str, args: tuple[Tensor, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 8, 1))
    planned = plan(model, mode, None, *args)["1"]
    assert reasons(planned) == {DEPTHWISE} and not planned.rewritten


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(6, 8), "6 in-features are not a multiple of 4"),
        (nn.Conv1d(6, 8, 3), "6 in-channels are not a multiple of 4"),
        (nn.Conv2d(8, 8, 3, groups=4), "2 in-channels per group are not a multiple of 4"),
    ],
    ids=["linear", "conv", "groups"],
)
def test_in_channels_that_no_block_divides(layer: nn.Module, size: str) -> None:
    planned = rows(plan(nn.Sequential(layer), "training", SPARSE)["0"])
    assert planned == {"forward": size, "backward": size, "update": "grad_output 2:4 mvue along auto"}
    assert not plan(nn.Sequential(layer), "weights", SPARSE)["0"].rewritten


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(8, 6), "6 out-features are not a multiple of 4"),
        (nn.Conv2d(8, 12, 3, groups=2), "6 out-channels per group are not a multiple of 4"),
    ],
    ids=["linear", "groups"],
)
@pytest.mark.parametrize("args", [(), (IMAGE,)], ids=["without args", "with args"])
def test_out_channels_that_no_block_divides_make_the_mask_row_wise(
    layer: nn.Module, size: str, args: tuple[Tensor, ...]
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), layer) if isinstance(layer, nn.Linear) else None
    model = model or nn.Sequential(nn.Conv2d(4, 8, 3), layer)
    planned = rows(plan(model, "t-weights", SPARSE, *args)[str(len(model) - 1)])
    assert planned == {
        "forward": "weight 2:4 greedy along in",
        "backward": f"{size}; the mask is row-wise",
        "update": NOT_ASKED,
    }


def test_out_channels_decide_about_sdgp() -> None:
    fits = plan(nn.Sequential(nn.Linear(6, 8)), SDGP, SPARSE)["0"]
    assert rows(fits)["backward"] == "grad_output 2:4 sdgp along out"
    assert rows(plan(nn.Sequential(nn.Linear(8, 6)), SDGP, SPARSE)["0"])["backward"] == (
        "6 out-features are not a multiple of 4"
    )


@pytest.mark.parametrize("args", [(), (torch.ones(2, 3, dtype=torch.long),)], ids=["fx", "export"])
def test_a_weight_tied_to_an_embedding_stays_dense(args: tuple[Tensor, ...]) -> None:
    planned = plan(Tied(), "training", SPARSE, *args)
    assert reasons(planned["head"]) == {"its weight is tied to the embedding 'embed'"}
    assert planned["fc"].rewritten


@pytest.mark.parametrize("args", [(), (TOKENS,)], ids=["fx", "export"])
@pytest.mark.parametrize("mode", ["training", "dense"])
def test_a_bypassed_layer_stays_dense(mode: str, args: tuple[Tensor, ...]) -> None:
    planned = plan(ReadsWeight(), mode, SPARSE, *args)["fc"]
    (reason,) = reasons(planned)
    assert reason == "bypassed: its weight is read by ReadsWeight.forward, where it is the layer 'fc.weight'"
    assert not planned.rewritten


@pytest.mark.parametrize("args", [(), (TOKENS,)], ids=["fx", "export"])
def test_inputs_that_may_be_negative_are_not_pruned_by_value(args: tuple[Tensor, ...]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    planned = plan(model, "activations", SPARSE, *args)
    assert [rows(one)["forward"] for one in planned.values()] == [
        UNPROVEN,
        UNPROVEN,
        "input 4:8 greedy_by_value along in",
    ]
    assert rows(plan(Opaque(*model), "activations", SPARSE)["4"])["forward"] == UNPROVEN


def test_magnitude_pruning_takes_any_input() -> None:
    asked = LayerConfig(input=Pruning("greedy", NMPattern(4, 8)))
    assert rows(plan(nn.Linear(8, 8), asked, SPARSE)[""])["forward"] == "input 4:8 greedy along in"


def test_none_leaves_a_layer_dense_even_in_dense_mode() -> None:
    for mode in presets:
        planned = plan(net(), mode, CompileConfig(layers={"2": None}))["2"]
        assert reasons(planned) == {"left dense by CompileConfig.layers"} and not planned.rewritten


@pytest.mark.parametrize("key", ["0", "0.weight", "re:0", r"re:0\.w.*"])
def test_a_layer_that_is_named_is_pruned_though_it_is_first(key: str) -> None:
    assert rows(plan(net(), "training", CompileConfig(layers={key: presets["weights"]}))["0"]) == {
        "forward": "weight 2:4 greedy along in",
        "backward": ROW_WISE,
        "update": NOT_ASKED,
    }


@pytest.mark.parametrize("config", [CompileConfig(), SPARSE])
def test_a_model_that_is_one_layer_has_an_empty_name_that_nobody_gave(config: CompileConfig) -> None:
    report = nmcompile.analyze(nn.Linear(8, 8), args=(torch.randn(2, 8),), config=config)
    assert (report.layers[0].status == "sparse") is (config is SPARSE)


def test_the_default_key_replaces_the_mode_but_names_no_layer() -> None:
    planned = plan(net(), "training", CompileConfig(layers={"_default": presets["gradients"], "2": None}))
    assert {name for name, one in planned.items() if one.rewritten} == {"5"}
    assert rows(planned["5"])["update"] == "grad_output 1:2 mvue along auto"
    assert reasons(planned["0"]) == {FIRST} and reasons(planned["6"]) == {LAST}


@pytest.mark.parametrize("group", ["batch", "flat"])
def test_the_update_gradient_is_grouped_as_asked(group: Literal["batch", "flat"]) -> None:
    asked = LayerConfig(update_gradient=Pruning("mvue", NMPattern(2, 4), group))
    assert rows(plan(net(), asked)["2"])["update"] == f"grad_output 2:4 mvue along {group}"


@pytest.mark.parametrize(
    ("layer", "asked", "problem"),
    [
        (nn.Linear(6, 8), presets["weights"], "forward GEMM: 6 in-features are not a multiple of 4"),
        (nn.Linear(8, 8), presets["activations"], f"forward GEMM: {UNPROVEN}"),
        (
            nn.Linear(8, 8),
            replace(presets["weights"], input=presets["activations"].input),
            f"forward GEMM: {UNPROVEN}",
        ),
        (nn.Linear(8, 6), SDGP, "backward GEMM: 6 out-features are not a multiple of 4"),
        (nn.Conv2d(4, 4, 3, groups=4), presets["gradients"], f"update GEMM: {DEPTHWISE}"),
        (nn.Conv2d(4, 4, 3, groups=4), SDGP, f"backward GEMM: {DEPTHWISE}"),
    ],
    ids=["weight", "input", "weight and input", "gradient", "depthwise update", "depthwise backward"],
)
def test_a_layer_named_exactly_gets_what_is_asked_or_an_error(
    layer: nn.Module, asked: LayerConfig, problem: str
) -> None:
    model = nn.Sequential(layer)
    for key in ("0", "0.weight"):
        with pytest.raises(PreconditionError) as raised:
            plan(model, "training", CompileConfig(layers={key: asked}))
        assert f"layer '0' (weight {tuple(model.state_dict()['0.weight'].shape)})" in str(raised.value)
        assert f".layers[{key!r}] asks in the {problem}" in str(raised.value)
    assert list(plan(model, "training", CompileConfig(layers={"re:0": asked}))) == ["0"]


def test_a_key_that_names_no_layer_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'7' in CompileConfig\.layers is not a layer"):
        plan(net(), "training", CompileConfig(layers={"7": None}))


def test_planning_is_deterministic_and_in_module_order() -> None:
    model = net()
    first = plan_phases(capture_model(model), preset("training"), CompileConfig())
    assert first == plan_phases(capture_model(model), preset("training"), CompileConfig())
    assert first.names() == ("0", "2", "5", "6")
    assert all(one.rows_of(phase) for one in first for phase in Phase)


def test_functional_layers_are_planned_by_their_weights_name() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.linear(x, self.w))

    assert list(plan(Functional(), "weights", SPARSE)) == ["w"]


@pytest.mark.parametrize("mode", ["weights", "t-weights"])
def test_a_weight_that_no_block_divides_has_no_mask_in_any_phase(mode: str) -> None:
    size = "6 in-features are not a multiple of 4"
    planned = rows(plan(nn.Sequential(nn.Linear(6, 8)), mode, SPARSE)["0"])
    assert planned == {"forward": size, "backward": size, "update": NOT_ASKED}
