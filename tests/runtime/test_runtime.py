"""Whole networks in integers: every code equals the module's, whose sums are computed exactly."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, Runtime, presets
from nmcompile.native import MISSING
from nmcompile.runtime.reference import ReferenceExecutor
from nmcompile.runtime.steps import Add, Call, Decode, Encode, Flatten, Layer, LayerToFloats, Recode, Sums
from tests.export.test_whole_networks import PRUNED, UNPRUNED, Block, X, end, network
from tests.runtime.exact_module import exact


def compiled(model: nn.Module, x: Tensor, config: CompileConfig = PRUNED) -> nn.Module:
    config = replace(config, clip="percentile")  # found at once
    model = model.eval()
    return nmcompile.compile(model, "inference", args=(x,), config=config, calibration=[x], backend="reference").eval()


def in_torch(runtime: Runtime, x: Tensor) -> Runtime:
    return Runtime(runtime.program, runtime.arena, ReferenceExecutor(runtime.program.steps), [x])


def check_equal(model: nn.Module, runtime: Runtime, x: Tensor) -> None:
    """Compare the integers that each layer reads, and the result, with the module's."""
    reference = in_torch(runtime, x)
    with exact(model) as noted:
        expected = model(x)
    assert torch.equal(reference(x), expected)
    assert torch.equal(runtime(x), expected)
    images = reference.executor.images  # type: ignore[attr-defined]
    for step in runtime.program.steps:
        if isinstance(step, Sums):
            (wanted,) = noted[step.weights.layer]
            found = (images[step.input].double() - step.zero).permute(0, 3, 1, 2)
            assert torch.equal(found.reshape(wanted.shape), wanted), step.weights.layer


@pytest.mark.parametrize(
    ("name", "config"),
    [("residual", PRUNED), ("residual", UNPRUNED), ("inverted", PRUNED), ("plain", UNPRUNED), ("growing", PRUNED)],
)
def test_codes_are_those_of_the_module(name: str, config: CompileConfig) -> None:
    x = X[:3]
    model = compiled(network(name), x, config)
    runtime = nmcompile.runtime(model, (x,))
    for scale in (0, 3, 100):
        check_equal(model, runtime, scale * torch.randn_like(x))
    kinds = [type(step) for step in runtime.program.steps]
    assert kinds.count(Encode) == 2 and kinds.count(Decode) == kinds.count(LayerToFloats) == 1
    assert kinds.count(Add) == {"residual": 3, "inverted": 2}.get(name, 0)
    convs = sum(isinstance(module, nn.Conv2d) for module in network(name).modules())
    assert kinds.count(Layer) == convs


def test_ten_thousand_inputs() -> None:
    """Small images through pooling, a sum and pruning: one wrong code in a million would show."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Block(8, 8), *end(8)]
    x = torch.randn(2000, 3, 6, 6)
    model = compiled(nn.Sequential(*layers), x[:50])
    runtime = nmcompile.runtime(model, (x,))
    for scale in (0.1, 0.5, 1, 2, 5):
        images = scale * torch.randn_like(x)
        with exact(model):
            expected = model(images)
        assert torch.equal(runtime(images), expected)


class Rare(nn.Module):
    """Operators that a runtime has steps for, in places where networks seldom have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 16, (1, 3), padding=(0, 2), dilation=2)
        self.grouped, self.even = nn.Conv2d(16, 32, 3, groups=2), nn.Conv2d(32, 16, 2, padding="same")
        self.round = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
        self.pool, self.drop = nn.MaxPool2d(2, ceil_mode=True), nn.Dropout(0.5)
        self.fc, self.head = nn.Linear(64, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.relu(self.wide(torch.relu(self.stem(x))))
        y = torch.relu(self.grouped(x))
        y = torch.relu(self.round(torch.clamp(self.even(y), 0, 0.3)))
        flat = self.drop(self.pool(self.pool(y)).flatten(1))
        y = nn.functional.softmax(self.fc(flat).sigmoid(), -1)
        return self.head(y), {"inside": x, "scaled": 2 * x}


def test_rare_operators() -> None:
    x = torch.randn(2, 3, 17, 15)
    model = compiled(Rare(), x)
    runtime = nmcompile.runtime(model, (x,))
    with exact(model) as noted:
        result, others = model(x)
    assert len(noted["wide"]) == 1
    for one in (runtime, in_torch(runtime, x)):
        found, other = one(x)
        torch.testing.assert_close(found, result)  # torch's softmax and sigmoid may round by position
        assert torch.equal(other["inside"], others["inside"]) and torch.equal(other["scaled"], others["scaled"])
    calls = {step.name for step in runtime.program.steps if isinstance(step, Call)}
    assert "softmax.int" in calls and not any("pool" in name or "clamp" in name for name in calls)
    assert any(isinstance(step, Flatten) for step in runtime.program.steps)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3)
    )


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Runtime, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    model = compiled(mlp(), x)
    return model, nmcompile.runtime(model, (x,)), x


def test_mlp(small: tuple[nn.Module, Runtime, Tensor]) -> None:
    model, runtime, x = small
    check_equal(model, runtime, 2 * torch.randn_like(x))
    assert [type(step) for step in runtime.program.steps] == [Encode, Layer, Layer, LayerToFloats]


def test_tokens() -> None:
    """Linear layers on three dims, with a norm and a GELU that torch computes."""
    layers = [nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)]
    x = torch.randn(2, 5, 16)
    model = compiled(nn.Sequential(*layers), x)
    check_equal(model, nmcompile.runtime(model, (x,)), torch.randn(2, 5, 16))


class Windows(nn.Module):
    """Attention in windows, as Swin makes them: memory that a view was traced on has other strides in a runtime."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 16, 1), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.stem(x)).permute(0, 2, 3, 1)
        windows = x.reshape(len(x), 2, 4, 2, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 16)
        y: Tensor = self.head(self.mix(windows @ windows.transpose(1, 2) @ windows))
        return y.mean(1)


def test_views_of_permuted_memory() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = compiled(Windows(), x)
    check_equal(model, nmcompile.runtime(model, (x,)), torch.randn(2, 3, 8, 8))


def test_a_layer_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            x = torch.relu(self.conv(x))
            y: Tensor = self.head(torch.relu(self.conv(x)))
            return y

    x = torch.randn(2, 3, 6, 6)
    model = compiled(Twice(), x)
    runtime = nmcompile.runtime(model, (x,))
    with exact(model):
        expected = model(x)
    assert torch.equal(runtime(x), expected)
    assert sum(isinstance(step, Sums) for step in runtime.program.steps) == 4


def test_keyword_arguments_and_structures() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, *, factor: Tensor, times: int = 1) -> dict[str, Tensor | None]:
            return {"y": self.net(x) * factor * times, "nothing": None}

    x, factor = torch.randn(4, 16), torch.tensor(2.0)
    kwargs = {"factor": factor, "times": 3}
    model = nmcompile.compile(
        Scaled().eval(), "inference", args=(x,), kwargs=kwargs, config=PRUNED, calibration=[{"x": x, **kwargs}],
        backend="reference",
    ).eval()  # fmt: skip
    runtime = nmcompile.runtime(model, (x,), kwargs=kwargs)
    with exact(model):
        expected = model(x, **kwargs)
    result = runtime(x, **kwargs)
    assert isinstance(result, dict) and result["nothing"] is None and torch.equal(result["y"], expected["y"])


def test_weights_are_a_snapshot() -> None:
    x = torch.randn(4, 16)
    model = compiled(mlp(), x)
    runtime = nmcompile.runtime(model, (x,))
    before = runtime(x)
    assert isinstance(before, Tensor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(runtime(x), before)


def test_results_are_not_overwritten(small: tuple[nn.Module, Runtime, Tensor]) -> None:
    _, runtime, x = small
    first = runtime(x)
    assert isinstance(first, Tensor)
    kept = first.clone()
    runtime(-x)
    assert torch.equal(first, kept)


def test_strided_inputs(small: tuple[nn.Module, Runtime, Tensor]) -> None:
    _, runtime, x = small
    assert torch.equal(runtime(x.t().contiguous().t()), runtime(x))


def test_print_and_profile() -> None:
    """4:8 costs no pass over memory where one layer reads what another writes."""
    x = X[:1]
    runtime = nmcompile.runtime(compiled(network("residual"), x), (x,))
    shown = str(runtime)
    assert all(name in shown for name in ("3.conv1", "Layer + 4:8", "1×8×8×16", "MB for activations"))
    assert MISSING or {row.form for row in runtime.rows if row.form} == {"dense", "sparse"}
    profile = runtime.profile(x, calls=2)
    assert len(profile.seconds) == len(runtime.program.steps) and min(profile.seconds) > 0
    assert "in all steps" in str(profile)
    inside = [step.weights.layer for step in runtime.program.steps if isinstance(step, Layer) and step.prune]
    alone = [step for step in runtime.program.steps if isinstance(step, Recode)]
    assert inside == ["3.conv1", "4.conv1", "5.conv1"] and len(alone) == 3 and all(step.prune for step in alone)


WRONG: dict[str, Callable[[Tensor], tuple[object, ...]]] = {
    "another batch": lambda x: (x[:2],),
    "another dtype": lambda x: (x.double(),),
    "integers": lambda x: (x.long(),),
    "another device": lambda x: (x.to("meta"),),
    "sparse": lambda x: (x.to_sparse(),),
    "too many": lambda x: (x, x),
    "none": lambda x: (),
    "a list": lambda x: ([x],),
    "a number": lambda x: (3,),
}


def test_other_inputs_are_refused(small: tuple[nn.Module, Runtime, Tensor]) -> None:
    _, runtime, x = small
    for change in WRONG.values():
        with pytest.raises(nmcompile.NMCompileError, match="runtime"):
            runtime(*change(x))
    assert isinstance(runtime(x), Tensor)


def test_nan_is_refused_and_infinity_clipped(small: tuple[nn.Module, Runtime, Tensor]) -> None:
    model, runtime, x = small
    x = x.clone()
    x[1, 3] = torch.inf
    check_equal(model, runtime, x)
    x[2, 5] = torch.nan
    for one in (runtime, in_torch(runtime, x)):
        with pytest.raises(nmcompile.NMCompileError, match="NaN"):
            one(x)


def test_models_that_have_no_runtime(small: tuple[nn.Module, Runtime, Tensor]) -> None:
    model, _, x = small
    refused = {
        "is not compiled": mlp(),
        "multiplies integers": nmcompile.compile(mlp().eval(), "weights"),
        "calibrated": nmcompile.compile(mlp().eval(), "inference", args=(x,)),
        "float64": nmcompile.compile(mlp().double().eval(), "inference", args=(x.double(),), calibration=[x.double()]),
        "wraps": nn.Sequential(model),
        "train mode": nmcompile.compile(mlp().eval(), "inference", calibration=[x]).train(),
    }
    for message, one in refused.items():
        with pytest.raises(nmcompile.NMCompileError, match=message):
            nmcompile.runtime(one, (x,))


def test_an_empty_example_is_refused(small: tuple[nn.Module, Runtime, Tensor]) -> None:
    model, _, x = small
    with pytest.raises(nmcompile.NMCompileError, match="empty"):
        nmcompile.runtime(model, (x[:0],))


def test_sums_that_may_not_fit_into_32_bits_are_torchs() -> None:
    x = torch.randn(1, 2**16)
    model = compiled(nn.Sequential(nn.Linear(2**16, 8), nn.ReLU(), nn.Linear(8, 8)), x)
    runtime = nmcompile.runtime(model, (x,))
    assert {step.name for step in runtime.program.steps if isinstance(step, Call)} >= {"0"}
    assert [step.weights.layer for step in runtime.program.steps if isinstance(step, Sums)] == ["2"]


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.addmm(self.bias, self.first(x), self.weight))
        return y


def test_a_layer_that_the_graph_does_not_show_is_named() -> None:
    x = torch.randn(4, 16)
    with pytest.raises(nmcompile.NMCompileError, match="whole weight 'weight'"):
        nmcompile.runtime(compiled(Transposed(), x, CompileConfig()), (x,))


def test_layers_without_a_grid_are_torchs() -> None:
    """Layers with floats for an input, between layers of integers."""
    config = CompileConfig(layers={"_default": presets["inference"], "2": presets["weights"]}, outputs="int8")
    x = torch.randn(4, 16)
    model = compiled(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16),
                                   nn.ReLU(), nn.Linear(16, 4)), x, config)  # fmt: skip
    runtime = nmcompile.runtime(model, (x,))
    with exact(model):
        expected = model(x)
    torch.testing.assert_close(runtime(x), expected)
    assert {step.name for step in runtime.program.steps if isinstance(step, Call)} >= {"2", "relu"}
