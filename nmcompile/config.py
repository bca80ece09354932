"""Configuration of a compilation: phases, the modes of the paper's Table 1, and all options."""

import enum
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from operator import methodcaller
from types import MappingProxyType
from typing import Literal

from nmcompile.checks import check_choice, check_kind, check_number
from nmcompile.errors import ConfigError, nearest
from nmcompile.files.read_files import parse_json
from nmcompile.layer_config import LayerConfig, Pruning, json_object, layer_json, read_fields, read_layer
from nmcompile.pruning.pattern import NMPattern

DEFAULT = "_default"
REGEX = "re:"
STEADY = "steady"
MOST_STEPS = 2**53
ENDS = ("dense", "sparse", "int8")
CLIPS = ("mse", "percentile", "pact")
PLACEMENTS = ("operand", "activation")
OUTPUTS = ("float", "int8")
GRANULARITIES = ("tensor", "channel")
WHERE = ("all", "pays", "likely")
MASKS = ("magnitude", "wanda", "sparsegpt", "admm")


class Phase(enum.Enum):
    """The three GEMMs of a training step."""

    __hash__ = object.__hash__  # that of Enum is a Python function, and each layer looks up its phases in each call

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"


def _pruned(operator: str, pattern: str) -> Pruning:
    return Pruning(operator, NMPattern.parse(pattern))


presets: Mapping[str, LayerConfig] = MappingProxyType(
    {
        "dense": LayerConfig(),
        "weights": LayerConfig(weight=_pruned("greedy", "2:4")),
        "t-weights": LayerConfig(weight=_pruned("transposable", "2:4")),
        "activations": LayerConfig(input=_pruned("greedy_by_value", "4:8")),
        "gradients": LayerConfig(update_gradient=_pruned("mvue", "1:2")),
        "training": LayerConfig(weight=_pruned("transposable", "2:4"), update_gradient=_pruned("mvue", "2:4")),
        "inference": LayerConfig(
            weight=_pruned("greedy", "2:4"),
            input=_pruned("greedy_by_value", "4:8"),
            weight_bits=4,
            input_bits=4,
        ),
    }
)
"""The rows of the paper's Table 1 by mode name, and `"dense"`, which rewrites every layer and prunes nothing."""


def preset(mode: str) -> LayerConfig:
    """Return the preset of a mode; raise for an unknown mode, with the nearest name."""
    check_choice("mode", mode, presets)
    return presets[mode]


@dataclass(frozen=True)
class CompileConfig:
    """Every option finer than the mode.

    Args:
        layers: overrides by name, most specific first: a weight's exact name (`"fc.weight"`), a layer's exact name,
            `"re:"` and a pattern that matches a whole weight name, then one that matches a whole layer name (first
            match wins), and `"_default"` for all others. `None` leaves the layer dense.
        refresh: how a mask follows its weight. `"steady"` rebuilds it every 4 optimizer steps, and a pruned weight
            replaces a kept one only if three quarters of its magnitude are more. A number of steps recomputes it from
            the weight alone after so many (40 in Hubara et al. 2021, 1 in SR-STE); `None` freezes the first one.
        sr_ste: SR-STE's λ, which adds λ (1 - mask) ∘ w to the gradient of pruned weights; 0 turns it off.
        ends: `"dense"` keeps the first layer and the last linear dense unless `layers` names them; `"sparse"` treats
            them like any other; `"int8"` lets them, and depthwise convolutions, compute in
            8 bits where the mode quantizes, with a step of the weight for each out-channel.
        clip: how the input grids find their clip: `"mse"` or `"percentile"` over the calibration data, or `"pact"`,
            learned from the `"mse"` clip on (`nmcompile.training.clips` are the parameters to give to the optimizer).
        granularity: one weight scale for each `"tensor"` or for each out-`"channel"`; 8-bit weights have the latter.
        placement: where activations are pruned and quantized: at the `"operand"` of each GEMM, or, for layers that a
            ReLU follows directly, at that `"activation"`. Then everything after it (batch norm, pooling, a residual
            branch) reads the pruned values, and the next GEMMs take them unchanged. Needs the whole graph.
        outputs: `"int8"` puts the result of a quantized layer on a calibrated 8-bit grid if anything other than a
            quantized layer reads it (a residual addition, a softmax): integer kernels write integers. Results that are
            added or concatenated share one step, so that their sums are integers too. `"float"` leaves results alone,
            and runtimes compute such layers in floating point. For deployment: training does not update these clips.
            Needs the whole graph; without it results stay as they are.
        where: `"all"` prunes everything in the plan. `"pays"` times each layer alone, pruned and dense, and leaves the
            phases dense that pruning does not make faster. Inputs are random, with the shape and layout that `args`
            give the layer. If a step of the whole model with `args` is slower than dense all the same, everything is
            left dense. The choice is made once, when the model is compiled (in the autocast context, with the threads
            and in the mode, `train()` or `eval()`, of that moment), by the first rank for all, and is stored in
            `sparse_state_dict`. `"likely"` decides by cost models alone, from the sizes that `args` give the layers: it
            reads no clock and runs nothing, so all ranks, and all machines with that type of device, decide the same,
            whatever their threads. Layers whose sizes or kernels no model knows stay pruned.
        masks: how the masks of weights are found. `"magnitude"` keeps the largest weights, and follows training. The
            others are for trained models, and read the `calibration` data of `compile`. `"wanda"` (Sun et al. 2023)
            keeps the largest products of weights and input norms. `"sparsegpt"` (Frantar & Alistarh 2023) and `"admm"`
            (Boža 2024) keep the outputs of each layer as close as they can, and change the kept weights too. These
            masks stand until they are found again: neither `refresh` nor a write to the weights changes them. If the
            weights are quantized, their integers are found with the masks, and the step of their grid, which fits the
            kept weights, stands too.
        refit: solve for the kept weights, by least squares of each layer's outputs over the calibration data; on the
            grid, if they are quantized.
        permute: before masks are found, put channels in an order in which the patterns keep more magnitude (Pool & Yu
            2021). The order is folded into the parameters and buffers of all layers that it concerns, so the model
            computes the same, and nothing is permuted at run time. Needs the whole graph; layers whose channels cannot
            move keep their order, and the report says why.
    """

    layers: Mapping[str, LayerConfig | None] = field(default_factory=dict)
    refresh: int | Literal["steady"] | None = "steady"
    sr_ste: float = 0.0
    ends: str = "dense"
    clip: str = "mse"
    granularity: str = "tensor"
    placement: str = "operand"
    outputs: str = "float"
    where: str = "all"
    masks: str = "magnitude"
    refit: bool = False
    permute: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        choices = {"ends": ENDS, "clip": CLIPS, "granularity": GRANULARITIES, "placement": PLACEMENTS}
        choices |= {"outputs": OUTPUTS, "where": WHERE, "masks": MASKS}
        for name, known in choices.items():
            check_choice(name, getattr(self, name), known)
        for name in ("refit", "permute"):
            check_kind(name, getattr(self, name), bool, "True or False")
        self._check_layers()

    @property
    def reads_data(self) -> bool:
        """Return whether masks or kept weights are found from calibration data."""
        return self.masks != "magnitude" or self.refit

    def _check_numbers(self) -> None:
        steps = f"{STEADY!r}, a number of optimizer steps >= 1, or None to freeze"
        factor = "SR-STE's λ, a finite number >= 0"
        is_steady = isinstance(self.refresh, str) and self.refresh == STEADY
        if self.refresh is not None and not is_steady:
            check_number("refresh", self.refresh, Integral, 1, MOST_STEPS, steps)
        check_number("sr_ste", self.sr_ste, Real, 0, sys.float_info.max, factor)

    def _check_layers(self) -> None:
        check_kind("CompileConfig.layers", self.layers, Mapping, "a dict, layer names to LayerConfigs")
        for key, value in self.layers.items():
            check_kind("a key of CompileConfig.layers", key, str, f"the name of a layer, {str(key)!r}")
            if key.startswith(REGEX):
                _compiled(key)
            expected = "a LayerConfig, or None for dense"
            check_kind(f"CompileConfig.layers[{key!r}]", value, LayerConfig | None, expected)

    def lookup(self, layer: str, weight: str) -> tuple[str, LayerConfig | None] | None:
        """Return the key and config that apply to a layer and its weight; `None` if there are none."""
        for name in (weight, layer):
            if name in self.layers:
                return name, self.layers[name]
        for name in (weight, layer):
            for key, value in self.layers.items():
                if key.startswith(REGEX) and _compiled(key).fullmatch(name):
                    return key, value
        return (DEFAULT, self.layers[DEFAULT]) if DEFAULT in self.layers else None

    def restricted_to(self, layers: Iterable[tuple[str, str]]) -> "CompileConfig":
        """Return this config without the keys that match none of these (layer, weight) names."""
        names = {name for pair in layers for name in pair}
        rules = {key for key in self.layers if key.startswith(REGEX) and any(map(_compiled(key).fullmatch, names))}
        kept = {key: one for key, one in self.layers.items() if key in names | rules | {DEFAULT}}
        return replace(self, layers=kept)

    def check_names(self, layers: Iterable[tuple[str, str]]) -> None:
        """Raise for a key that matches no (layer, weight) name, and for a name that would read as a rule."""
        names = {name for pair in layers for name in pair}
        for name in names:
            if name.startswith(REGEX) or name == DEFAULT:
                raise ConfigError(
                    f"the model has a layer or weight named {name!r}, which CompileConfig.layers would read as a rule "
                    "for others; rename it"
                )
        for key in self.layers:
            if key.startswith(REGEX):
                if not any(_compiled(key).fullmatch(name) for name in names):
                    nearby = nearest(key.removeprefix(REGEX), names)
                    raise ConfigError(f"{key!r} in CompileConfig.layers matches no layer; {nearby}")
            elif key != DEFAULT and key not in names:
                raise ConfigError(f"{key!r} in CompileConfig.layers is not a layer of the model; {nearest(key, names)}")

    def to_json(self) -> str:
        """Return the config as JSON text that `from_json` reads back."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["layers"] = {name: None if c is None else layer_json(c) for name, c in self.layers.items()}
        return json.dumps(data, indent=2, default=methodcaller("item"))  # NumPy's numbers

    @classmethod
    def from_json(cls, text: str | bytes) -> "CompileConfig":
        """Read the text that `to_json` wrote; raise for an unknown key, with the nearest name."""
        check_kind("text", text, str | bytes, "the JSON text that to_json returned")
        data = json_object(parse_json(text, "the config", error=ConfigError), "CompileConfig")
        layers = json_object(data.get("layers", {}), "CompileConfig.layers")
        return read_fields(cls, data | {"layers": {name: read_layer(layer) for name, layer in layers.items()}})


def given_config(config: CompileConfig | None) -> CompileConfig:
    """Return the config given to a function, or the default for None."""
    check_kind("config", config, CompileConfig | None, "a CompileConfig, or None")
    return CompileConfig() if config is None else config


def _compiled(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key.removeprefix(REGEX))
    except (re.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"{key!r} in CompileConfig.layers is not a regular expression: {reason}") from error
