"""A public function works with any argument, or says which argument is wrong and what to give."""

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime import SessionOptions
from torch import nn

import nmcompile
from nmcompile import NMPattern, Phase, pruning, quantization, training
from nmcompile.api import recipes
from nmcompile.api.callbacks import lightning_callback, trainer_callback
from nmcompile.api.distill import output_error
from nmcompile.backends.shared.saved_choices import load_choices, save_choices
from nmcompile.backends.tensorrt import load_engine
from nmcompile.errors import ConfigError, ExportError, NMCompileError
from nmcompile.quantization import Grid, Histogram

X = torch.randn(4, 8)
JUNK: dict[str, Any] = {
    "None": None,
    "True": True,
    "5": 5,
    "-3": -3,
    "2.5": 2.5,
    "nan": math.nan,
    "huge": 10**400,
    "text": "x",
    "NUL": "a\0b",
    "bytes": b"x.onnx",
    "list": [],
    "list of a list": [[]],
    "dict": {},
    "dict of numbers": {3: 4},
    "object": object(),
    "class": nn.Linear,
    "function": lambda *_, **__: None,
    "tensor": torch.ones(2),
    "integers": torch.ones(2, 8, dtype=torch.int64),
    "array": np.ones(2),
    "module": nn.ReLU(),
    "pattern": NMPattern(1, 2),
    "grid": Grid(2, True),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def compiled(mode: str = "weights") -> nn.Module:
    return nmcompile.compile(net(), mode).eval()


class Writer:
    """A writer that takes scalars and forgets them."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...


TRAINER: Any = SimpleNamespace(is_global_zero=True, loggers=[])


def graphed() -> dict[str, Any]:
    model = compiled()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return {"model": model, "loss": nn.functional.mse_loss, "optimizer": optimizer, "example": (X, X)}


def quantized_and_calibrated() -> nn.Module:
    return nmcompile.compile(net(), "inference", args=(X,), calibration=[X]).eval()


def frozen_llama() -> nn.Module:
    from tests.api.test_decoder import frozen

    return frozen()


def quantized() -> nn.Module:
    return compiled("inference")


def observed() -> Histogram:
    histogram = Histogram()
    histogram.observe(X)
    return histogram


def written(**given: Any) -> None:
    """Export far enough to pass all checks of arguments: the error about train mode comes after them."""
    try:
        nmcompile.export(**given)
    except ExportError as error:
        assert "is in train mode" in str(error)


OPERATOR = {"x": X, "pattern": "2:4", "dim": -1, "generator": None, "out": None}
COMPILE: dict[str, Any] = {"mode": "weights", "args": (X,), "kwargs": None, "config": None, "backend": "auto"}
CONTROL: dict[str, Any] = {"calibration": None, "validation": lambda _: 1.0, "max_drop": 0.5, "inplace": False}
EXPORT: dict[str, Any] = {
    "kwargs": None,
    "target": None,
    "container": "int8",
    "precision": "fp32",
    "dynamic_batch": False,
    "verify": False,
}
DISTILL: dict[str, Any] = {"steps": 1, "optimizer": None, "loss": output_error}
RECIPE: dict[str, Any] = {"config": None, "inplace": False}

Good = Callable[[], dict[str, Any]]
SURFACE: dict[str, tuple[Callable[..., Any], Good]] = {
    "compile": (nmcompile.compile, lambda: {"model": net(), **COMPILE, **CONTROL}),
    "bisect": (
        nmcompile.bisect,
        lambda: {
            "model": net(),
            "check": lambda _: True,
            "mode": "weights",
            "args": (X,),
            "kwargs": None,
            "config": None,
        },
    ),
    "bench": (
        nmcompile.bench,
        lambda: {"model": net().eval(), "mode": "weights", "args": (X,), "kwargs": None, "config": None},
    ),
    "analyze": (nmcompile.analyze, lambda: {"model": net(), **COMPILE, "predict": False}),
    "choose_patterns": (
        nmcompile.choose_patterns,
        lambda: {"model": net(), **COMPILE, "patterns": ["2:4"], "budget": 0.9, "cost": "macs", "calibration": [X]},
    ),
    "fatrelu": (
        nmcompile.fatrelu,
        lambda: {"model": net(), "calibration": [X], "max_change": 0.1, "inplace": False},
    ),
    "distill": (
        recipes.distill,
        lambda: {
            "compiled": compiled(),
            "dense": net(),
            "data": [X],
            "steps": 1,
            "optimizer": None,
            "loss": output_error,
        },
    ),
    "inspect": (nmcompile.inspect, lambda: {"compiled": compiled(), "args": (X,), "kwargs": None}),
    "monitor": (training.monitor, lambda: {"model": compiled(), "writer": Writer(), "share": 0.01}),
    "MonitorTraining": (
        lambda **given: training.MonitorTraining(**given).on_train_start(TRAINER, compiled()),
        lambda: {"writer": Writer(), "share": 0.01},
    ),
    "decompile": (nmcompile.decompile, lambda: {"compiled": compiled()}),
    "is_compiled": (nmcompile.is_compiled, lambda: {"model": compiled()}),
    "finalize": (nmcompile.finalize, lambda: {"compiled": compiled()}),
    "runtime": (nmcompile.runtime, lambda: {"compiled": quantized_and_calibrated(), "args": (X,), "kwargs": None}),
    "freeze": (nmcompile.freeze, lambda: {"model": compiled()}),
    "decoder": (nmcompile.decoder, lambda: {"compiled": frozen_llama(), "length": 8}),
    "calibrate": (nmcompile.calibrate, lambda: {"compiled": quantized(), "data": [X]}),
    "export": (
        written,
        lambda: {
            "compiled": compiled().train(),
            "path": "m.onnx",
            "args": (X,),
            **EXPORT,
        },
    ),
    "compare": (nmcompile.compare, lambda: {"dense": net(), "compiled": compiled(), "batch": X}),
    "verify": (nmcompile.verify, lambda: {"target": compiled(), "pattern": None, "step": None}),
    "sparse_state_dict": (nmcompile.sparse_state_dict, lambda: {"model": compiled()}),
    "load_sparse_state_dict": (
        nmcompile.load_sparse_state_dict,
        lambda: {"model": compiled(), "state": nmcompile.sparse_state_dict(compiled())},
    ),
    "NMPattern": (NMPattern, lambda: {"n_keep": 2, "block": 4}),
    "NMPattern.parse": (NMPattern.parse, lambda: {"text": "2:4"}),
    "Pruning": (nmcompile.Pruning, lambda: {"operator": "greedy", "pattern": "2:4", "group": "auto"}),
    "LayerConfig": (
        nmcompile.LayerConfig,
        lambda: dict.fromkeys(inspect.signature(nmcompile.LayerConfig).parameters),
    ),
    "CompileConfig": (
        nmcompile.CompileConfig,
        lambda: (
            {name: p.default for name, p in inspect.signature(nmcompile.CompileConfig).parameters.items()}
            | {"layers": {}}
        ),
    ),
    "CompileConfig.from_json": (nmcompile.CompileConfig.from_json, lambda: {"text": "{}"}),
    "Report.layer": (nmcompile.analyze(net()).layer, lambda: {"name": "0"}),
    "Report.diff": (nmcompile.analyze(net()).diff, lambda: {"other": nmcompile.analyze(net())}),
    "greedy": (pruning.greedy, lambda: dict(OPERATOR)),
    "mvue": (pruning.mvue, lambda: dict(OPERATOR)),
    "prune": (pruning.mvue.prune, lambda: {"x": X, "pattern": "2:4", "dim": 1, "key": pruning.draw_key()}),
    "mask": (pruning.mask, lambda: {"x": X, "pattern": "2:4", "dim": -1}),
    "check": (pruning.check, lambda: {"x": X, "dim": 1}),
    "draw_key": (pruning.draw_key, lambda: {"generator": None, "device": None}),
    "transposable_mask": (
        pruning.transposable_mask,
        lambda: {"w": X, "pattern": "2:4", "dims": (0, 1), "method": "exact"},
    ),
    "fake_quantize": (quantization.fake_quantize, lambda: {"x": X, "scale": 0.5, "grid": Grid(4, True)}),
    "integers": (quantization.integers, lambda: {"x": X, "scale": 0.5, "grid": Grid(4, True)}),
    "absorbed_step": (quantization.absorbed_step, lambda: {"step": X[0], "gain": X[1]}),
    "pact_quantize": (quantization.pact_quantize, lambda: {"x": X, "clip": torch.tensor(1.0), "bits": 4}),
    "positive_clip": (quantization.positive_clip, lambda: {"clip": torch.tensor(1.0)}),
    "sawb_scale": (quantization.sawb_scale, lambda: {"w": X, "bits": 4, "dim": None}),
    "sawb_quantize": (quantization.sawb_quantize, lambda: {"w": X, "bits": 4, "mask": None, "dim": None}),
    "Grid": (Grid, lambda: {"bits": 4, "signed": True}),
    "Histogram.observe": (Histogram().observe, lambda: {"x": X}),
    "Histogram.percentile": (observed().percentile, lambda: {"percent": 99.0}),
    "Histogram.best_clip": (observed().best_clip, lambda: {"grid": Grid(4, True)}),
    "clips": (training.clips, lambda: {"compiled": compiled()}),
    "step": (training.step, lambda: {"model": compiled()}),
    "graphed_step": (training.graphed_step, graphed),
    "scheme_a": (
        lambda **given: next(recipes.scheme_a(**given)),
        lambda: {"model": net(), "calibration": [X], **RECIPE},
    ),
    "scheme_b": (
        lambda **given: next(recipes.scheme_b(**given)),
        lambda: {"model": net(), "calibration": [X], **RECIPE},
    ),
    "asp": (lambda **kwargs: list(recipes.asp(**kwargs)), lambda: {"model": net(), **RECIPE}),
    "lightning_callback": (lightning_callback, lambda: {"recipe": iter([net()]), "begins": [0, 1]}),
    "trainer_callback": (trainer_callback, lambda: {"recipe": iter([net()]), "begins": [0, 1]}),
    "register": (nmcompile.onnxruntime.register, lambda: {"session_options": SessionOptions()}),
    "Limits": (nmcompile.onnxruntime.Limits, lambda: {"seconds": 1.0, "memory": 2**30}),
}
CASES = [(name, argument) for name, (_, good) in SURFACE.items() for argument in good()]
OPTIONAL = {("compile", "args"), ("compile", "calibration"), ("analyze", "args"), ("scheme_a", "calibration")}
OPTIONAL |= {("inspect", "args"), ("bisect", "args"), ("MonitorTraining", "writer")}
OPTIONAL |= {("scheme_b", "calibration"), ("CompileConfig", "refresh"), ("choose_patterns", "args")}
"""Where None is taken, though it is not what the working call gives."""
ACCEPTED: dict[tuple[str, str], set[str]] = {
    ("compile", "kwargs"): {"dict"},
    ("decoder", "length"): {"5"},
    ("compile", "calibration"): {"list"},  # nothing is quantized
    ("compile", "max_drop"): {"5", "2.5", "huge"},
    ("compile", "inplace"): {"True"},
    ("analyze", "kwargs"): {"dict"},
    ("analyze", "predict"): {"True"},
    ("bench", "kwargs"): {"dict"},
    ("bisect", "kwargs"): {"dict"},
    ("inspect", "kwargs"): {"dict"},
    ("decompile", "compiled"): {"module"},
    ("is_compiled", "model"): {"module"},
    ("finalize", "compiled"): {"module"},
    ("runtime", "kwargs"): {"dict"},
    ("export", "kwargs"): {"dict"},
    ("export", "dynamic_batch"): {"True"},
    ("export", "verify"): {"True"},
    ("verify", "pattern"): {"pattern"},
    ("verify", "step"): {"function"},
    ("NMPattern", "block"): {"5"},
    ("NMPattern.parse", "text"): {"pattern"},
    ("Pruning", "pattern"): {"pattern"},
    ("CompileConfig", "layers"): {"dict"},
    ("CompileConfig", "refresh"): {"5"},
    ("CompileConfig", "sr_ste"): {"5", "2.5"},
    ("CompileConfig", "refit"): {"True"},
    ("CompileConfig", "permute"): {"True"},
    ("choose_patterns", "kwargs"): {"dict"},
    ("fatrelu", "inplace"): {"True"},
    ("distill", "dense"): {"module"},
    ("distill", "steps"): {"5"},
    ("greedy", "x"): {"tensor"},
    ("greedy", "pattern"): {"pattern"},
    ("mvue", "x"): {"tensor"},
    ("mvue", "pattern"): {"pattern"},
    ("prune", "pattern"): {"pattern"},
    ("mask", "x"): {"tensor"},
    ("mask", "pattern"): {"pattern"},
    ("transposable_mask", "pattern"): {"pattern"},
    ("fake_quantize", "x"): {"tensor"},
    ("fake_quantize", "scale"): {"5", "2.5"},
    ("fake_quantize", "grid"): {"grid"},
    ("integers", "x"): {"tensor"},
    ("integers", "scale"): {"5", "2.5"},
    ("integers", "grid"): {"grid"},
    ("pact_quantize", "x"): {"tensor"},
    ("pact_quantize", "bits"): {"5"},
    ("positive_clip", "clip"): {"tensor"},
    ("sawb_scale", "w"): {"tensor"},
    ("sawb_quantize", "w"): {"tensor"},
    ("Grid", "bits"): {"5"},
    ("Grid", "signed"): {"True"},
    ("Histogram.observe", "x"): {"tensor"},
    ("Histogram.percentile", "percent"): {"5", "2.5"},
    ("Histogram.best_clip", "grid"): {"grid"},
    ("clips", "compiled"): {"module"},
    ("step", "model"): {"module"},
    ("scheme_a", "inplace"): {"True"},
    ("scheme_b", "inplace"): {"True"},
    ("scheme_b", "calibration"): {"list", "list of a list"},  # for the second phase
    ("asp", "inplace"): {"True"},
    ("Limits", "seconds"): {"5", "2.5"},
    ("Limits", "memory"): {"5"},
}
"""Values that turn out to be valid, besides None if that is the default."""
NAMES = {
    "n_keep": "pattern",
    "block": "pattern",
    "text": "pattern|the config",
    "other": "the report",
    "patterns": "pattern",
    "x": "the tensor to prune|takes a dense|a tensor of shape",
    "w": "the tensor to prune|takes a dense|a tensor of shape",
    "data": "calibration batch",
    "model": "ReLU",
    "dense": "ReLU",
    "compiled": "ReLU",
    "target": "ReLU|cannot be read",
}
"""Arguments' names in messages, if they differ from the arguments' own names."""
RUN = {
    ("compile", "validation"): {"class", "module"},
    ("verify", "step"): {"class", "module"},
    ("bisect", "check"): {"class", "module", "function"},
    ("distill", "loss"): {"class", "module"},
    ("graphed_step", "loss"): {"class", "module", "function"},
}
"""Functions that are run, and whose own errors come through; without a GPU a loss is not run."""


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_an_argument_is_taken_or_named(
    name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    act, good = SURFACE[name]
    given, accepted = good(), set()
    for kind in JUNK.keys() - RUN.get((name, argument), set()):
        try:
            act(**given | {argument: JUNK[kind]})
            accepted.add(kind)
        except NMCompileError as error:
            assert re.search(rf"\b{argument}\b|{NAMES.get(argument, argument)}", str(error)), (kind, str(error))
    default = {"None"} if given[argument] is None or (name, argument) in OPTIONAL else set()
    assert accepted == ACCEPTED.get((name, argument), set()) | default


TYPES = (
    nmcompile.ExportReport,
    nmcompile.NMCompileError,
    nmcompile.Runtime,
    nmcompile.ThreeGemm,
    Histogram,
    Phase,
    pruning.PruningOperator,
)


@pytest.mark.parametrize("module", [nmcompile, pruning, quantization, training, nmcompile.onnxruntime])
def test_every_public_function_is_tried(module: ModuleType) -> None:
    tried = [nmcompile.export, *(act for act, _ in SURFACE.values()), *PATHS.values(), *TYPES]
    public = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    ours = {key: value for key, value in public.items() if value.__module__.startswith("nmcompile")}
    assert [key for key, value in ours.items() if value not in tried] == []


PATHS: dict[str, Callable[[Any], object]] = {
    "verify": nmcompile.verify,
    "export": lambda path: nmcompile.export(compiled(), path, (X,)),
    "ONNX Runtime": nmcompile.onnxruntime.OnnxRuntimeModel,
    "load_engine": load_engine,
    "save_choices": save_choices,
    "load_choices": load_choices,
    "Report.to_html": nmcompile.analyze(net()).to_html,
}


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"m.onnx"


@pytest.mark.parametrize("path", [None, 5, BytesPath(), "a\0.onnx", "\ud800.onnx", Path("a\0b") / "m.onnx", ""])
@pytest.mark.parametrize("name", PATHS)
def test_what_no_file_can_be_called_is_refused(name: str, path: Any) -> None:
    with pytest.raises(ConfigError, match=r"(path|target|model) is .*; give a (path|model)"):
        PATHS[name](path)


SCORES: dict[str, tuple[Any, str]] = {
    "nothing": (None, "None"),
    "text": ("0.5", "'0.5'"),
    "complex number": (1j, "of type complex"),
    "pair": ((0.5, 0.5), "of type tuple"),
    "two numbers": (torch.ones(2), r"of shape \(2,\)"),
    "array of two": (np.ones((1, 2)), r"of shape \(1, 2\)"),
    "complex tensor": (torch.tensor(1j), "of type complex"),
}


@pytest.mark.parametrize("case", SCORES)
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_score_is_a_number(case: str, call: int) -> None:
    """Scores of the dense model, of the compiled one, and of one with a layer less."""
    value, shown = SCORES[case]
    scores = iter([[value], [1.0, value], [1.0, 0.0, value]][call])
    with pytest.raises(ConfigError, match=f"the score that validation returns is {shown}; let it return a number"):
        nmcompile.compile(net(), "weights", validation=lambda _: next(scores), max_drop=0.1)


@pytest.mark.parametrize("one", [1, True, np.float32(1), np.ones(1), torch.tensor(1), torch.ones(1, 1)])
def test_a_single_number_of_any_kind_is_a_score(one: Any) -> None:
    model = nmcompile.compile(net(), "weights", validation=lambda _: one, max_drop=0)
    report = nmcompile.inspect(model)
    assert report.reverted is not None and report.reverted.dense == 1.0


def with_module(name: str) -> nn.Module:
    model = net()
    model[0].add_module(name, nn.ReLU())
    return model


def with_buffer(name: str) -> nn.Module:
    model = net()
    model[2].register_buffer(name, torch.ones(1))
    return model


def with_attribute(name: str) -> nn.Module:
    model = net()
    setattr(model[4], name, 3)
    return model


def with_property(name: str) -> nn.Module:
    model = net()
    model[0].__class__ = type("Named", (nn.Linear,), {name: property(lambda self: 3)})
    return model


@pytest.mark.parametrize("make", [with_module, with_buffer, with_attribute, with_property])
@pytest.mark.parametrize("name", ["three_gemms", "three_gemm_graph", "absorbing_layer"])
@pytest.mark.parametrize("act", [nmcompile.compile, nmcompile.analyze])
def test_names_of_our_own_are_refused(name: str, make: Callable[[str], nn.Module], act: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=rf"module '\d'.*attribute '{name}'.*rename it"):
        act(make(name))


@pytest.mark.parametrize("name", ["re:x", "_default"])
def test_layers_named_like_rules_are_refused(name: str) -> None:
    model = nn.Sequential()
    for one in ("first", name, "last"):
        model.add_module(one, nn.Linear(8, 8))
    with pytest.raises(ConfigError, match=f"named '{name}(.weight)?'.*rename it"):
        nmcompile.compile(model)
