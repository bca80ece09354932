"""Masks from calibration data: each layer is solved from the inputs that the pruned model gives it."""

import copy
import gc
import importlib
import threading
import warnings
import weakref
from collections import UserDict
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile
from nmcompile import CompileConfig, NMPattern
from nmcompile.api import solve_layers, solved_parts
from nmcompile.api.compile import rewrite
from nmcompile.api.request import Request
from nmcompile.api.solved_parts import SolvedParts, _read_part, identify_run
from nmcompile.api.visit_layers import TO_DENSE
from nmcompile.backends.shared import choose_kernel
from nmcompile.backends.shared.choose_kernel import is_small
from nmcompile.errors import CalibrationError, ConfigError, FileError
from nmcompile.ir.layers import LinearLayer, conv_layer
from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.solve import solve
from nmcompile.quantization import Histogram
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.training.find_masks import masks_of
from tests.faults import killed_at, steps_of

compile_module = importlib.import_module("nmcompile.api.compile")  # its function hides it in the package
METHODS = ("wanda", "sparsegpt", "admm")
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
MODES = {"weights": False, "t-weights": True}


def config(method: str, **options: Any) -> CompileConfig:
    return CompileConfig(masks=method, ends="sparse", **options)


def compiled_by(method: str, model: nn.Module | None = None, mode: str = "weights", **options: Any) -> Any:
    """Compile a model, by default the network of these tests, with masks from the data of these tests."""
    given: dict[str, Any] = {"calibration": batches(), "config": config(method)} | options
    return nmcompile.compile(mlp() if model is None else model, mode, **given)


def mlp(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))


def batches(width: int = 16, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(width, width, generator=generator)
    return [torch.randn(20, width, generator=generator) @ mixing for _ in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def distance(one: nn.Module, other: nn.Module) -> float:
    x = batches()[0]
    return float((one(x) - other(x)).norm())


def is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@torch.no_grad()
def solve_in_a_row(model: nn.Sequential, data: Iterable[Tensor], method: str, is_transposable: bool) -> nn.Sequential:
    """Prune the layers of a sequence one after another; a plain loop, without any of the machinery of compile."""
    dense, model, streams = model, copy.deepcopy(model), [(x, x) for x in data]
    for reference, module in zip(dense, model, strict=True):
        if isinstance(module, nn.Linear):
            layer = LinearLayer("layer", tuple(module.weight.shape), module.bias is not None)
            hessian = Hessian(layer, torch.device("cpu"), method != "wanda" and module.bias is not None)
            for x, aim in streams:
                hessian.add(x, None if method == "wanda" else x.lerp(aim, TO_DENSE))
            found = solve(method, layer, module.weight, hessian, NMPattern.parse("2:4"), is_transposable)
            module.weight.copy_(found.weight)
            if found.bias is not None:
                module.bias.copy_(module.bias.double() + found.bias)
        streams = [(module(x), reference(aim)) for x, aim in streams]
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_each_layer_sees_the_pruned_models_inputs(method: str, mode: str) -> None:
    expected = solve_in_a_row(mlp(), batches(), method, MODES[mode])
    compiled = compiled_by(method, mode=mode)
    assert is_same(nmcompile.finalize(compiled).state_dict(), expected.state_dict())
    x = batches()[0]
    torch.testing.assert_close(compiled(x), expected(x))


@pytest.mark.parametrize("method", METHODS)
def test_the_source_keeps_its_weights(method: str) -> None:
    model = mlp()
    before = state(model)
    compiled = compiled_by(method, model)
    assert is_same(before, model.state_dict())
    is_shared = compiled[0].weight is model[0].weight
    assert is_shared == (method == "wanda")  # which changes no weight
    assert (compiled[0].bias is model[0].bias) == is_shared


def test_biases_that_two_layers_read_stay() -> None:
    """The gain of one layer would be wrong in the other."""
    model = mlp()
    model[2].bias = model[0].bias
    compiled = compiled_by("sparsegpt", model)
    assert compiled[0].bias is model[0].bias and compiled[2].bias is model[0].bias
    assert compiled[4].bias is not model[4].bias

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(16, 16) / 4) for _ in range(2))
            self.bias = nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = F.linear(F.linear(x, self.first, self.bias).tanh(), self.second, self.bias)
            return y

    twice = Functional()
    assert compiled_by("sparsegpt", twice).bias is twice.bias


class _Head(nn.Module):
    """A head without a mask; all copies note the sizes of the batches that they see in one list."""

    seen: ClassVar[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:  # and no proxy
            self.seen.append(len(x))
        return x.softmax(-1)


@pytest.mark.parametrize("method", METHODS)
def test_batches_end_after_the_last_mask(method: str) -> None:
    """The head of a language model takes a fifth of the time; only the batch that counts calls runs through it."""
    _Head.seen.clear()
    sizes = 20, 21, 22
    compiled_by(method, nn.Sequential(mlp(), _Head()), calibration=[batches()[0].repeat(2, 1)[:size] for size in sizes])
    assert _Head.seen == [20]


class _ReadsBias(nn.Module):
    """A forward that adds the bias of one of its layers once more, as an attribute of it or of a variable."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16) / 4), nn.Parameter(torch.randn(16))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.b(self.a(x).tanh()), self.weight, self.bias)
        if self.how == "attribute":
            return y + self.b.bias
        if self.how == "own":
            return y + self.bias
        layer = self._modules["b" if self.how == "variable" or x.sum() < 1e9 else "a"]  # no trace can tell
        assert isinstance(layer, nn.Linear)
        return y + layer.bias


@pytest.mark.parametrize(
    ("how", "moved"),
    [
        ("attribute", {"a.bias", "bias"}),
        ("own", {"a.bias", "b.bias"}),
        ("variable", {"a.bias", "bias"}),
        ("unknown variable", set()),
    ],
)
def test_biases_that_forward_reads_too_stay(how: str, moved: set[str]) -> None:
    torch.manual_seed(0)
    model = _ReadsBias(how)
    compiled = compiled_by("sparsegpt", model, mode="weights")
    before, after = dict(model.named_parameters()), dict(compiled.named_parameters())
    assert {name for name in before if name.endswith("bias") and after[name] is not before[name]} == moved


@pytest.mark.parametrize("mode", MODES)
def test_packed_and_functional_biases_take_up_the_mean_error(mode: str) -> None:
    """The mean output of a last layer is that of the dense weights for the middle of both models' inputs."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.weight = nn.Parameter(torch.randn(16, 16) / 4)
            self.bias = nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.attention(x, x, x)[0].reshape(-1, 16))

        def last(self, x: Tensor) -> Tensor:
            y: Tensor = torch.addmm(self.bias, x, self.weight)
            return y

    torch.manual_seed(0)
    model, data = Model(), [x.reshape(4, 5, 16) for x in batches()]
    compiled = compiled_by("sparsegpt", model, mode, calibration=data)
    for name in ("attention.in_proj_bias", "attention.out_proj.bias", "bias"):
        assert not torch.equal(compiled.get_parameter(name), model.get_parameter(name))
    with torch.no_grad():
        inputs = [torch.cat([one.attention(x, x, x)[0].reshape(-1, 16) for x in data]) for one in (compiled, model)]
        expected = model.last(inputs[0].lerp(inputs[1], TO_DENSE)).mean(0)
        found = torch.cat([compiled(x) for x in data]).mean(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_pruned_and_dense_runs_may_take_different_ways() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
            self.last = nn.Linear(16, 8)
            self.ways: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).tanh()
            self.ways.append(int(x[0, 0] > 0))
            y: Tensor = self.last(self.experts[self.ways[-1]](x))
            return y

    torch.manual_seed(0)
    model, data = Routed(), batches(count=40)
    compiled = compiled_by("sparsegpt", model, calibration=data)
    ways: dict[nn.Module, list[int]] = {}
    for one in (model, compiled):
        one.ways = ways[one] = []
        for x in data:
            one(x)
    assert ways[model] != ways[compiled]
    assert nmcompile.verify(compiled).ok
    assert {mask.found is not None for mask in masks_of(compiled).values()} == {True}


def test_inplace_writes_into_the_parameters() -> None:
    model = mlp()
    weight = model[2].weight
    expected = compiled_by("sparsegpt")
    assert compiled_by("sparsegpt", model, inplace=True) is model
    assert model[2].weight is weight
    assert is_same(model.state_dict(), expected.state_dict())


def test_batches_may_come_from_a_generator() -> None:
    expected = compiled_by("sparsegpt")
    compiled = compiled_by("sparsegpt", calibration=iter(batches()))
    assert is_same(compiled.state_dict(), expected.state_dict())


def test_refit_lowers_the_error_that_is_reported() -> None:
    def error(**options: Any) -> float:
        model = compiled_by("wanda", config=config("wanda", **options))
        found = masks_of(model)["0.weight"].found
        assert found is not None
        return found.error

    assert error(refit=True) < error()


def test_magnitude_masks_can_be_refitted() -> None:
    plain = nmcompile.compile(mlp(), "weights", config=config("magnitude"))
    compiled = compiled_by("magnitude", config=config("magnitude", refit=True))
    assert distance(compiled, mlp()) < distance(plain, mlp())
    first = "0.weight"
    assert torch.equal(masks_of(compiled)[first].tensor, masks_of(plain)[first].tensor)


class Experts(nn.Module):
    """A model in which each sample takes its own way; no sample takes the last expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[int(x.sum() > 0)]
        y: Tensor = self.head(expert(x))
        return y


def test_batches_may_take_different_ways() -> None:
    torch.manual_seed(0)
    model = Experts()
    data = [x.abs() if number % 2 else -x.abs() for number, x in enumerate(batches(count=6))]
    compiled = compiled_by("sparsegpt", model, calibration=data)
    for x in data:
        compiled(x)
    report = nmcompile.inspect(compiled)
    assert {layer.name: layer.status for layer in report.layers} == {
        "experts.0": "sparse",
        "experts.1": "sparse",
        "experts.2": "dense",
        "head": "sparse",
    }
    assert torch.equal(compiled.experts[2].weight, model.get_parameter("experts.2.weight"))
    own = solve_in_a_row(nn.Sequential(model.experts[0]), data[::2], "sparsegpt", False)
    assert torch.equal(nmcompile.finalize(compiled).get_parameter("experts.0.weight"), own.get_parameter("0.weight"))


class Recurrent(nn.Module):
    """A model that calls one layer three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        return x


def test_a_layer_called_again_is_solved_from_all_its_inputs() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    compiled = compiled_by("sparsegpt", model)
    layer = LinearLayer("inner", (16, 16), True)
    hessian = Hessian(layer, torch.device("cpu"))
    with torch.no_grad():
        for x in batches():
            for _ in range(3):
                hessian.add(x)
                x = torch.tanh(model.inner(x))
    expected = solve("sparsegpt", layer, model.inner.weight, hessian, NMPattern.parse("2:4"), False)
    assert torch.equal(compiled.inner.weight, expected.weight)


def test_packed_projections_are_solved_by_their_rows() -> None:
    """Queries, keys and values of cross-attention see other inputs."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x.flip(-1), x.sin())[0]
            return y

    torch.manual_seed(0)
    model, data = Cross(), [x.reshape(4, 5, 16) for x in batches()]
    compiled = compiled_by("sparsegpt", model, calibration=data)
    packed = nmcompile.finalize(compiled).get_parameter("attention.in_proj_weight")
    changes: list[Callable[[Tensor], Tensor]] = [lambda x: x, lambda x: x.flip(-1), torch.sin]
    for part, see in enumerate(changes):
        rows = nn.Sequential(nn.Linear(16, 16))
        rows[0].weight = nn.Parameter(model.attention.in_proj_weight[16 * part : 16 * part + 16].detach())
        rows[0].bias = nn.Parameter(model.attention.in_proj_bias[16 * part : 16 * part + 16].detach())
        expected = solve_in_a_row(rows, [see(x) for x in data], "sparsegpt", False)
        # Attention puts tokens in another order, in which the sums round otherwise.
        torch.testing.assert_close(packed[16 * part : 16 * part + 16], expected[0].weight)
    assert nmcompile.verify(compiled).ok


class Functional(nn.Module):
    """A model with a functional linear, a weight stored (in, out), and a slice of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)
        self.transposed = nn.Parameter(torch.randn(16, 16) / 4)
        self.bias = nn.Parameter(torch.randn(16))
        self.both = nn.Parameter(torch.randn(32, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.bias, F.linear(x, self.weight).tanh(), self.transposed).tanh()
        return F.linear(x, self.both[:16]) + F.linear(x, self.both[16:]).tanh()


@pytest.mark.parametrize("mode", MODES)
def test_functional_layers_and_slices(mode: str) -> None:
    torch.manual_seed(0)
    model = Functional()
    magnitude = nmcompile.compile(model, mode, config=config("magnitude"))
    compiled = compiled_by("sparsegpt", model, mode)
    methods = {name: mask.found.method for name, mask in masks_of(compiled).items() if mask.found}
    assert set(methods.values()) == {"sparsegpt"}
    assert methods.keys() == masks_of(compiled).keys()
    assert nmcompile.verify(compiled).ok
    assert distance(compiled, model) < distance(magnitude, model)
    x = batches()[0]
    torch.testing.assert_close(nmcompile.finalize(compiled)(x), compiled(x))


def test_a_computed_weight_gets_only_a_mask() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 8))
    compiled = compiled_by("sparsegpt", model)
    methods = {name: mask.found.method for name, mask in masks_of(compiled).items() if mask.found}
    assert methods == {"0.weight": "wanda", "1.weight": "sparsegpt"}


def test_masks_stand_through_training() -> None:
    compiled = compiled_by("sparsegpt", config=config("sparsegpt", refresh=1))
    masks = {name: mask.tensor.clone() for name, mask in masks_of(compiled).items()}
    optimizer = torch.optim.SGD(compiled.parameters(), 0.5)
    for x in batches():
        compiled(x).square().mean().backward()
        optimizer.step()
    compiled.load_state_dict(mlp().state_dict())
    with torch.no_grad():
        compiled[0].weight.data.neg_()
    compiled(batches()[0])
    assert is_same(masks, {name: mask.tensor for name, mask in masks_of(compiled).items()})


def test_masks_survive_another_compilation_and_a_copy() -> None:
    compiled = compiled_by("sparsegpt")
    again = nmcompile.compile(copy.deepcopy(compiled), "weights", config=config("sparsegpt"))
    for name, mask in masks_of(again).items():
        assert torch.equal(mask.tensor, masks_of(compiled)[name].tensor)
        assert mask.found == masks_of(compiled)[name].found


def test_a_layer_that_validation_reverts_has_its_own_weight_again() -> None:
    model, x = mlp(), batches()[0]

    @torch.no_grad()
    def validation(candidate: nn.Module) -> float:
        return -float((candidate.get_submodule("0")(x) - model[0](x)).norm())

    compiled = compiled_by("sparsegpt", model, validation=validation, max_drop=0.0)
    compiled(x)
    assert [layer.name for layer in nmcompile.inspect(compiled).layers if layer.status == "sparse"] == ["2", "4"]
    assert torch.equal(compiled[0].weight, model.get_parameter("0.weight"))
    assert not torch.equal(compiled[2].weight, model.get_parameter("2.weight"))


def test_a_pruned_input_is_what_the_hessian_sees() -> None:
    """4:8 activations are pruned before the GEMM, so a column that is never kept costs nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    compiled = compiled_by("sparsegpt", model, "inference", args=(batches()[0],))
    x = batches()[0]
    magnitude = nmcompile.compile(model, "inference", args=(x,), calibration=batches(), config=config("magnitude"))
    assert distance(compiled, model) < distance(magnitude, model)


def test_the_hessian_sees_the_integers_that_a_runtime_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are rounded, then pruned, ties to the lowest index: coarse integers tie in most blocks."""
    seen: list[Tensor] = []
    add = Hessian.add

    def recording(hessian: Hessian, x: Tensor, dense: Tensor | None = None) -> None:
        if hessian.layer.name == "2":
            seen.append(x)
        add(hessian, x, dense)

    monkeypatch.setattr(Hessian, "add", recording)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    compiled = compiled_by("sparsegpt", model, "inference", args=(batches()[0],)).eval()
    step = {triple.layer.name: triple for triple in triples_of(compiled)}["2"].steps.of_input()
    assert step is not None and len(seen) == len(batches())
    ties = 0
    for batch, found in zip(batches(), seen, strict=True):
        integers = (compiled[:2](batch).detach() / step).round().clamp(0, 15).long().reshape(-1, 8).tolist()
        order = [[place for _, place in sorted((-q, place) for place, q in enumerate(q8))] for q8 in integers]
        kept = [[q * (i in first[:4]) for i, q in enumerate(q8)] for q8, first in zip(integers, order, strict=True)]
        assert torch.equal((found / step).round().long().reshape(-1, 8), torch.tensor(kept))
        ties += sum(q8[first[3]] == q8[first[4]] > 0 for q8, first in zip(integers, order, strict=True))
    assert ties > 10


def test_a_quantized_input_is_what_the_hessian_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to the grid with the least squared error over all batches, beside the dense inputs that it stands for."""
    seen: dict[str, Hessian] = {}

    def recording(method: str, layer: LinearLayer, weight: Tensor, hessian: Hessian, *rest: Any) -> object:
        seen[layer.name] = hessian
        return solve(method, layer, weight, hessian, *rest)

    monkeypatch.setattr(solve_layers, "solve", recording)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    compiled_by("sparsegpt", model, "inference", args=(batches()[0],))
    dense = torch.cat(batches())
    steps = torch.linspace(0.1, 1, 400) * dense.abs().max() / 7
    rounded = torch.stack([(dense / step).round().clamp(-7, 7) * step for step in steps])
    nearest = rounded[(rounded - dense).square().sum((1, 2)).argmin()]
    torch.testing.assert_close(seen["0"].second_moments()[0], nearest.T @ nearest / len(dense), rtol=0.02, atol=0.02)
    monkeypatch.setattr("nmcompile.one_shot.hessian.DAMPING", 1e-6)
    weight = torch.randn(4, 16)
    seen_deviation, deviation = (x - x.mean(0) for x in (nearest, dense))  # biases take up the means
    best = torch.linalg.lstsq(seen_deviation, deviation @ weight.T).solution.T
    found = seen["0"].retargeted(weight[None])[0]
    left = [(seen_deviation @ one.T - deviation @ weight.T).norm() for one in (best, found, weight)]
    assert left[1] < 1.02 * left[0] < 0.98 * left[2]


def test_later_layers_see_rounded_ones_and_clips_stand() -> None:
    """The clip of a layer is the best for its inputs as the model before it gives them, with everything rounded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    compiled = compiled_by("sparsegpt", model, "inference", args=(batches()[0],)).eval()
    seen, hiddens = Histogram(), [(compiled[:2](x), model[:2](x)) for x in batches()]
    with torch.no_grad():
        for hidden, _ in hiddens:
            seen.observe(hidden * nmcompile.pruning.mask(hidden, NMPattern(4, 8)))
    clips = {triple.layer.name: triple.steps.input for triple in triples_of(compiled)}
    assert clips["2"] is not None and clips["2"].grid is not None
    assert float(clips["2"].clip) == pytest.approx(seen.best_clip(clips["2"].grid), rel=1e-5)
    found = torch.cat([compiled(x) for x in batches()]).mean(0)
    expected = torch.cat([model[2](hidden.lerp(dense, TO_DENSE)) for hidden, dense in hiddens]).mean(0)
    last = {triple.layer.name: triple for triple in triples_of(compiled)}["2"]
    step = last.steps.of_accumulator(compiled[2].weight)
    assert step is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=0.51 * float(step))  # the bias is rounded to whole steps


def test_the_report_names_method_and_error() -> None:
    compiled = compiled_by("sparsegpt")
    compiled(batches()[0])
    report = nmcompile.inspect(compiled)
    found = masks_of(compiled)["2.weight"].found
    assert found is not None
    assert report.layer("2").found == found
    assert f"mask by sparsegpt, output error {found.error:.2%}" in report.full()
    assert "mask by sparsegpt, output error " in str(report)
    assert f'"error": {found.error}' in report.to_json()


class Interrupt(BaseException):
    pass


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compiled_by("sparsegpt")
    solved: list[str] = []

    def counting(method: str, layer: LinearLayer, *rest: Any) -> object:
        solved.append(layer.name)
        if len(solved) == 3:
            raise Interrupt
        return solve(method, layer, *rest)

    monkeypatch.setattr(solve_layers, "solve", counting)
    folder = tmp_path / "masks"
    model = mlp()
    with pytest.raises(Interrupt):
        compiled_by("sparsegpt", model, checkpoint=folder)
    assert is_same(model.state_dict(), mlp().state_dict())
    compiled = compiled_by("sparsegpt", model, checkpoint=folder)
    assert solved == ["0", "2", "4", "4"]
    assert is_same(compiled.state_dict(), expected.state_dict())
    assert is_same(nmcompile.sparse_state_dict(compiled), nmcompile.sparse_state_dict(expected))


def test_a_kill_at_any_step_of_a_checkpoint_leaves_whole_parts(tmp_path: Path) -> None:
    """The files of a killed run are used, and the finished run equals one that was not killed."""
    expected = compiled_by("sparsegpt", checkpoint=tmp_path / "whole")
    whole = [_read_part(file) for file in (tmp_path / "whole").glob("*.pt")]
    found = whole[:2]

    def write(folder: Path) -> None:
        folder.mkdir()
        parts = SolvedParts(folder, found[0][2])
        for part, solved, _ in found:
            parts.add(part, solved)

    killed, unfinished = 0, {}
    for step in range(steps_of(lambda: write(tmp_path / "counted"))):
        folder = tmp_path / str(step)
        killed += killed_at(step, partial(write, folder))
        saved = SolvedParts(folder, found[0][2]).parts
        assert all(torch.equal(saved[part].mask, solved.mask) for part, solved, _ in found if part in saved)
        unfinished[len(saved)] = folder
    for folder in unfinished.values():
        assert is_same(compiled_by("sparsegpt", checkpoint=folder).state_dict(), expected.state_dict())
        assert len(list(folder.glob("*.pt"))) == len(whole)
    assert killed > 10 and unfinished.keys() >= {0, 1}


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": batches(count=2)},
        {"config": config("admm")},
        {"config": config("sparsegpt", refit=True)},
        {"mode": "t-weights"},
    ],
    ids=["data", "method", "refit", "mode"],
)
def test_a_checkpoint_of_another_run_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    compiled_by("sparsegpt", checkpoint=tmp_path)
    with pytest.raises(ConfigError, match="another model, other calibration data or another config"):
        compiled_by("sparsegpt", checkpoint=tmp_path, **change)
    with pytest.raises(ConfigError, match="another model"):
        compiled_by("sparsegpt", mlp()[:3], checkpoint=tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.pt").write_bytes(b"damaged")
    with pytest.raises(FileError, match=r"0\.pt: not a whole file of masks"):
        compiled_by("wanda", checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty"),
        ([*batches(), torch.full((4, 16), torch.nan)], "layer '0': calibration batch 3 gives NaN or infinity"),
        ([*batches(), torch.zeros(4, 15)], r"calibration batch 3 is float32\[4, 15\]"),
        (batches()[0], "give an iterable of batches"),
    ],
    ids=["empty", "nan", "shape", "tensor"],
)
def test_bad_data_is_an_error_and_leaves_the_model(data: Iterable[object], message: str) -> None:
    model = mlp()
    with pytest.raises(CalibrationError, match=message):
        compiled_by("sparsegpt", model, calibration=data, inplace=True)
    assert is_same(model.state_dict(), mlp().state_dict())
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [({"masks": "sparsegpt"}, "masks='sparsegpt'"), ({"refit": True}, "refit=True")],
    ids=["masks", "refit"],
)
def test_data_is_needed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*needs data for .*; pass calibration="):
        nmcompile.compile(mlp(), "weights", config=CompileConfig(**options))


def test_results_do_not_depend_on_the_callers_settings() -> None:
    """Threads of their own run the batches, whatever the thread of the caller has set."""
    expected = compiled_by("sparsegpt")
    data = batches()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        compiled = compiled_by("sparsegpt", calibration=data)
    assert is_same(compiled.state_dict(), expected.state_dict())
    assert not compiled[0].weight.is_inference()


def test_no_clock_decides_how_sums_round(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), torch.randn(512, 256)
    assert not is_small(len(data) * 256**2, on_gpu=False)
    monkeypatch.setattr(choose_kernel, "measure", mock.Mock(side_effect=AssertionError("a kernel was timed")))
    for is_asked in (False, True):
        torch.use_deterministic_algorithms(is_asked)
        compiled_by("sparsegpt", model, calibration=[data])
        assert torch.are_deterministic_algorithms_enabled() == is_asked
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_are_solved_together(method: str) -> None:
    model = mlp()
    model[4] = nn.Linear(32, 32)
    model[4].weight = model[2].weight
    compiled = compiled_by(method, model)
    assert compiled[4].weight is compiled[2].weight
    assert nmcompile.verify(compiled).ok
    assert {mask.found is not None for mask in masks_of(compiled).values()} == {True}


def test_a_write_between_two_layers_is_seen() -> None:
    class Writing(nn.Module):
        def __init__(self, is_copied: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.is_copied = is_copied
            self.first, self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            left = self.left(h)
            h = h.clone() if self.is_copied else h
            h[:, ::2] = 0
            y: Tensor = left + self.right(h)
            return y

    written, copied = (compiled_by("sparsegpt", Writing(is_copied)) for is_copied in (False, True))
    assert is_same(written.state_dict(), copied.state_dict())


def test_context_variables_are_the_callers() -> None:
    scale: ContextVar[float] = ContextVar("scale")

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * scale.get())

    token = scale.set(0.5)
    torch.manual_seed(0)
    compiled = compiled_by("wanda", nn.Sequential(nn.Linear(16, 16), Scaled(16, 16)))
    scale.reset(token)
    assert len(masks_of(compiled)) == 2


def test_a_layer_that_only_sees_empty_inputs_stays_dense() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x) + self.unused(x[x[:, 0] > 1e9]).sum()
            return y

    torch.manual_seed(0)
    compiled = compiled_by("sparsegpt", Gated())
    compiled(batches()[0])
    report = nmcompile.inspect(compiled)
    assert [report.layer(name).status for name in ("used", "unused")] == ["sparse", "dense"]


class Encoding(UserDict[str, Any]):
    """A mapping that pytree does not know, as Hugging Face's `BatchEncoding`."""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([np.arange(2000.0)], [np.where(np.arange(2000) == 1000, 0, np.arange(2000.0))]),
        ([Encoding(x=torch.arange(2000))], [Encoding(x=torch.arange(2000).flip(0))]),
        ([{"x": X, "y": -X}], [{"y": X, "x": -X}]),
        ([X], [X.view(4, 2, 16)]),
        ([X], [X.double()]),
        ([(X, 1)], [(X, 2)]),
    ],
    ids=["array", "mapping", "keys", "shape", "dtype", "number"],
)
def test_runs_with_other_batches_differ(one: list[object], other: list[object]) -> None:
    assert identify_run(mlp(), (), one) == identify_run(mlp(), (), copy.deepcopy(one))
    assert identify_run(mlp(), (), one) != identify_run(mlp(), (), other)


def test_runs_of_other_models_differ() -> None:
    other = mlp()
    other[1] = nn.Tanh()
    assert identify_run(mlp(), (), [X]) != identify_run(other, (), [X])


def test_batches_that_cannot_be_compared_make_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an object of type object, which cannot be compared"):
        compiled_by("wanda", calibration=[(x, object()) for x in batches()], checkpoint=tmp_path)


def test_a_new_pattern_needs_data_again() -> None:
    found = compiled_by("wanda")
    other = CompileConfig(
        masks="wanda", layers={"_default": nmcompile.LayerConfig(weight=nmcompile.Pruning("greedy", NMPattern(1, 4)))}
    )
    with pytest.raises(ConfigError, match=r"needs data for '0\.weight'"):
        nmcompile.compile(found, "weights", config=other)


def test_a_hand_written_update_does_not_warn() -> None:
    compiled = compiled_by("wanda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in batches():
            compiled(x).square().mean().backward()
            with torch.no_grad():
                for parameter in compiled.parameters():
                    parameter -= 0.01 * parameter.grad


def test_no_thread_to_wait_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(CalibrationError, match="give fewer and larger batches"):
        compiled_by("wanda")


def test_padding_is_not_added_twice() -> None:
    """A convolution pads circularly before its GEMM, so the GEMM's input is padded when the layer waits."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
    data = [torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    compiled = compiled_by("sparsegpt", nn.Sequential(conv), calibration=data)
    layer = conv_layer("conv", conv.weight.shape, True, padding=1, padding_mode="circular")
    hessian = Hessian(layer, torch.device("cpu"), is_centred=True)
    for x in data:
        hessian.add(x)
    expected = solve("sparsegpt", layer, conv.weight, hessian, NMPattern.parse("2:4"), False)
    torch.testing.assert_close(compiled[0].weight.detach(), expected.weight)


@pytest.mark.parametrize("is_saved", [False, True])
def test_solved_weights_are_not_copied_for_each_trial(is_saved: bool, tmp_path: Path) -> None:
    """Peaks would grow with the depth of a model: the solved tensor is the memory of the new parameter."""
    made: list[int] = []

    class Solved(solved_parts.Solved):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.weight is not None:
                made.append(self.weight.untyped_storage().data_ptr())

    with mock.patch.multiple(solve_layers, Solved=Solved), mock.patch.multiple(solved_parts, Solved=Solved):
        compiled = compiled_by("sparsegpt", checkpoint=tmp_path if is_saved else None)
    for layer in (0, 2, 4):
        assert compiled[layer].weight.untyped_storage().data_ptr() in made
    with torch.no_grad():
        compiled[0].weight.add_(1)  # is the model's own: a file stays as it is
    if is_saved:
        again = compiled_by("sparsegpt", checkpoint=tmp_path)
        assert torch.equal(again[2].weight, compiled[2].weight)
        assert not torch.equal(again[0].weight, compiled[0].weight)


def test_trials_are_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial's modules refer to each other, so its masks would stay until the collector runs."""
    alive: list[int] = []
    trials: list[weakref.ref[nn.Module]] = []

    def rewriting(request: Request, inplace: bool = False) -> nn.Module:
        made = rewrite(request, inplace)
        alive.append(sum(one() is not None for one in trials))
        trials.append(weakref.ref(made))
        return made

    monkeypatch.setattr(compile_module, "rewrite", rewriting)
    was_on = gc.isenabled()
    gc.disable()
    try:
        compiled_by("sparsegpt", mode="inference", args=(batches()[0],))
    finally:
        if was_on:
            gc.enable()
    assert len(alive) == 3 and max(alive) == 0
