"""The options of `torch.compile(model, backend="nmcompile", options={...})`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from nmcompile.checks import check_kind
from nmcompile.config import CompileConfig, given_config, preset
from nmcompile.errors import ConfigError, nearest
from nmcompile.ir.protocols import Backend

MODULE_ONLY = "compile the model with nmcompile.compile, and the result with torch.compile"
FIXED = {"where": "all", "masks": "magnitude", "refit": False, "permute": False, "placement": "operand"}
"""Options of `CompileConfig` that need the whole model, and the only values that a graph can be compiled with."""


@dataclass(frozen=True)
class Options:
    """The `options` of `torch.compile(model, backend="nmcompile", options={...})`.

    Args:
        mode: a row of Table 1, `"training"` or `"dense"`; torch's own `mode=` is a shorter way to give it.
        config: anything finer than the mode, also as the text of `CompileConfig.to_json`. Names of layers are those of
            the module that is compiled; all graphs follow one config, so a name that none of them has is no error.
        kernels: the backend of nmcompile, as `nmcompile.compile` takes it.
        then: the backend of torch.compile that gets the sparse graphs.
        then_options: the options of that backend.
    """

    mode: str = "training"
    config: CompileConfig = field(default_factory=CompileConfig)
    kernels: str | Backend = "auto"
    then: str | Callable[..., object] = "inductor"
    then_options: Mapping[str, Any] | None = None

    @classmethod
    def given(cls, mode: object, options: object) -> "Options":
        """Return the options of a call of torch.compile, checked."""
        check_kind("options", options, Mapping | None, "a dict")
        values: dict[str, Any] = {} if mode is None else {"mode": mode}
        values |= options if isinstance(options, Mapping) else {}
        known = [one.name for one in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"options has no key {name!r}; {nearest(str(name), known)}")
        if isinstance(values.get("config"), str):
            values["config"] = CompileConfig.from_json(values["config"])
        result = cls(**values)
        result._check()
        return result

    def _check(self) -> None:
        asked = preset(self.mode)
        check_kind("then", self.then, str | Callable, "the name of a backend of torch.compile, or a backend")
        check_kind("then_options", self.then_options, Mapping | None, "a dict of that backend's options")
        config = given_config(self.config)
        if asked.weight_bits or asked.input_bits:
            raise ConfigError(
                f"mode={self.mode!r} needs calibration data, which torch.compile has none of; {MODULE_ONLY}"
            )
        for name, only in FIXED.items():
            if getattr(config, name) != only:
                raise ConfigError(
                    f"CompileConfig({name}={getattr(config, name)!r}) needs the whole model, and a backend of "
                    f"torch.compile sees graphs of it; {MODULE_ONLY}"
                )
        for key, layer in config.layers.items():
            if layer is not None and (layer.weight_bits or layer.input_bits):
                raise ConfigError(
                    f"CompileConfig.layers[{key!r}] quantizes, which needs calibration data; {MODULE_ONLY}"
                )

    @property
    def key(self) -> str:
        """Return a text that is the same for options under which parameters share their masks."""
        kernels = self.kernels if isinstance(self.kernels, str) else self.kernels.name
        return json.dumps([self.mode, self.config.to_json(), kernels])
