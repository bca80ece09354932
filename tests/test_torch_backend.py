"""torch.compile(model, backend="nmcompile") against nmcompile.compile of the same model."""

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nmcompile
from nmcompile import CompileConfig
from nmcompile.api.torch_backend import torch_backend
from nmcompile.errors import CaptureError, ConfigError

CONFIG = CompileConfig(refresh=2)
SIZES = 5, 7, 6


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    gc.collect()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class BrokenBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        torch._dynamo.graph_break()
        return x + self.down(hidden.relu())


class Network(nn.Module):
    block: type[Block] = Block

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(8, 8), self.block(), self.block(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.stem(x))))


class Checkpointed(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.b, checkpoint(self.a, self.stem(x), use_reentrant=False), use_reentrant=False))


class Broken(Network):
    block = BrokenBlock


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        convs = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()
        super().__init__(nn.Unflatten(1, (3, 4, 4)), *convs, nn.Flatten(), nn.Linear(8, 4))


def backend(model: nn.Module, mode: str, then: str = "eager") -> Callable[..., Tensor]:
    options: dict[str, Any] = {"mode": mode, "config": CONFIG, "then": then}
    return torch.compile(model, backend=torch_backend, options=options)


def module(model: nn.Module, mode: str) -> Callable[..., Tensor]:
    return nmcompile.compile(model, mode, config=CONFIG, inplace=True)


def trained(make: type[nn.Module], run_of: Callable[[nn.Module], Callable[..., Tensor]], **kwargs: Any) -> list[Tensor]:
    """Train for some steps, with batches of several sizes and calls in eval() between them; return what was seen."""
    torch.manual_seed(0)
    model = make()
    return steps(model, run_of(model), **kwargs)


def steps(
    model: nn.Module,
    run: Callable[..., Tensor],
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    width: int = 8,
) -> list[Tensor]:
    optimizer, seen = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), []
    for step, size in enumerate(SIZES):
        x = torch.randn(size, width, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        with context():
            loss = run(x).float().square().mean()
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        if step % 2:
            model.eval()
            with torch.no_grad():
                seen.append(run(x).sum())
            model.train()
    return [*seen, *(parameter.detach().clone() for parameter in model.parameters())]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("mode", "then"),
    [("dense", "eager"), ("training", "aot_eager"), ("activations", "eager")],
)
def test_training_is_that_of_the_compiled_module_bit_for_bit(mode: str, then: str) -> None:
    """Losses, gradients and parameters: with masks that are rebuilt, open batch sizes, and calls in eval()."""
    got = trained(Network, lambda model: backend(model, mode, then))
    gc.collect()  # another model that lives at the same time has streams of its own
    assert same(got, trained(Network, lambda model: module(model, mode)))


def test_convolutions_running_statistics_and_autocast() -> None:
    options: dict[str, Any] = {"context": lambda: torch.autocast("cpu", torch.bfloat16), "width": 48}
    got = trained(Convolutional, lambda model: backend(model, "t-weights"), **options)
    assert same(got, trained(Convolutional, lambda model: module(model, "t-weights"), **options))


def test_layers_inside_activation_checkpointing_are_sparse() -> None:
    got = trained(Checkpointed, lambda model: backend(model, "training", then="aot_eager"))
    gc.collect()
    assert same(got, trained(Checkpointed, lambda model: module(model, "training")))


def test_a_checkpointed_module_is_one_graph_from_the_first_call_on() -> None:
    """That a layer is called is noted while Dynamo traces; to set an attribute there broke the graph."""
    model = nmcompile.compile(Checkpointed(), "training", inplace=True)
    torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(4, 8)).sum().backward()
    assert "4 of 6 layers sparse" in str(nmcompile.inspect(model))


def test_inductor_comes_next() -> None:
    model, x = Network(), torch.randn(4, 8)
    expected = nmcompile.compile(model, "t-weights")(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    y = torch.compile(model, backend=torch_backend, mode="t-weights")(x)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(torch.autograd.grad(y.square().sum(), list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torchs_own_mode_names_the_row_of_table_1() -> None:
    model, x = Network(), torch.randn(4, 8)
    masked = nmcompile.compile(model, "weights", args=(x,))
    run = torch.compile(model, backend=torch_backend, mode="weights")
    with torch.no_grad():
        torch.testing.assert_close(run(x), masked(x))
    assert (model(x) - masked(x)).norm() > 0.01


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of Dynamo, which looks at all that arrives
class TestGraphBreaks:
    def test_parts_share_the_masks_of_their_parameters(self) -> None:
        """Both blocks run the same code, in two graphs each, in train() and eval(); each weight has one mask.

        Parts of a model have no ends.
        """
        got = trained(Broken, lambda model: backend(model, "t-weights"))
        config = CompileConfig(refresh=2, ends="sparse")
        expected = trained(Broken, lambda model: nmcompile.compile(model, "t-weights", config=config, inplace=True))
        assert same(got, expected)

    def test_layers_of_the_same_name_draw_differently(self) -> None:
        """The graphs of both blocks have a layer `up`; equal weights and inputs show the draws."""
        torch.manual_seed(0)
        blocks = BrokenBlock(), BrokenBlock()
        blocks[1].load_state_dict(blocks[0].state_dict())
        x = torch.randn(64, 8)
        for block in blocks:
            torch.compile(block, backend=torch_backend, options={"mode": "gradients", "then": "eager"})(
                x
            ).sum().backward()
        assert not torch.equal(blocks[0].up.weight.grad, blocks[1].up.weight.grad)  # type: ignore[arg-type]

    def test_the_report_joins_the_graphs_and_names_what_has_none(self) -> None:
        model = Broken()
        model.spare = nn.Linear(8, 8)
        run = backend(model, "training")
        run(torch.randn(4, 8)).sum().backward()
        report = nmcompile.inspect(run)  # type: ignore[arg-type]
        assert {layer.name for layer in report.layers} >= {"stem", "up", "down", "up#2", "down#2"}
        assert all(layer.status == "sparse" for layer in report.layers)
        assert set(report.program.captured.python) == {"spare"}


def test_the_finalized_model_computes_the_same() -> None:
    model = Network()
    run, x = backend(model, "training"), torch.randn(6, 8)
    steps(model, run)
    plain = nmcompile.finalize(run)  # type: ignore[arg-type]
    assert type(plain) is Network and nmcompile.verify(plain).ok
    assert {check.name for check in nmcompile.verify(plain).checks} == {
        f"{block}.{layer}.weight" for block in "ab" for layer in ("up", "down")
    }
    with torch.no_grad():
        assert torch.equal(plain(x), run(x))
    assert (plain(x) - model(x)).norm() > 0.01


def test_tied_weights_stay_dense() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.mid(self.embed(ids)))

    model = Tied()
    options: dict[str, Any] = {"config": CompileConfig(ends="sparse").to_json(), "then": "eager"}
    torch.compile(model, backend=torch_backend, options=options)(torch.arange(4)).sum().backward()
    report = nmcompile.inspect(model)
    assert {layer.name: layer.status for layer in report.layers} == {"mid": "sparse", "embed": "dense"}
    assert report.layer("embed").reasons[0].startswith("its weight is tied to the embedding")


def test_names_in_the_config_are_those_of_the_module() -> None:
    config = CompileConfig(layers={"a.up": None, "re:b\\..*": nmcompile.presets["weights"], "elsewhere": None})
    model, options = Network(), dict[str, Any](config=config, then="eager")
    torch.compile(model, backend=torch_backend, options=options)(torch.randn(2, 8))
    report = nmcompile.inspect(model)
    rows = {layer.name: layer.operands(nmcompile.Phase.FORWARD) for layer in report.layers}
    assert rows["a.up"] == "dense" and rows["a.down"] == "W 2:4 transposable" and rows["b.up"] == "W 2:4 greedy"


@pytest.mark.parametrize("make", [Checkpointed, Convolutional])
def test_reports_count_what_graphs_of_fixed_shapes_multiply(make: type[nn.Module]) -> None:
    model, x = make(), torch.randn(4, 48 if make is Convolutional else 8)
    whole = nmcompile.analyze(model, args=(x,))
    backend(model, "training")(x)
    report = nmcompile.inspect(model)
    assert {layer.name: layer.macs for layer in report.layers} == {layer.name: layer.macs for layer in whole.layers}
    assert report.summary["uncounted_layers"] == 0


def test_reports_on_open_shapes_say_how_to_fix_them() -> None:
    model = Block()
    torch.compile(model, backend=torch_backend, options={"then": "eager"}, dynamic=True)(torch.randn(4, 8))
    assert "dynamic=False of torch.compile" in str(nmcompile.inspect(model))


def test_nothing_keeps_a_model_alive() -> None:
    model = Network()
    backend(model, "training", then="aot_eager")(torch.randn(4, 8)).sum().backward()
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert all(weight() is None for weight in weights)


def test_a_model_without_layers_is_handed_on() -> None:
    x = torch.randn(4, 8)
    assert torch.equal(torch.compile(nn.ReLU(), backend=torch_backend)(x), x.relu())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "inference"}, "needs calibration data"),
        ({"mode": "reduce-overhead"}, "'reduce-overhead'"),
        ({"mod": "training"}, "did you mean 'mode'"),
        ({"config": CompileConfig(where="pays")}, "needs the whole model"),
        ({"config": CompileConfig(masks="wanda")}, "needs the whole model"),
        ({"config": 3}, "CompileConfig"),
        ({"then": 3}, "then is 3"),
        ({"kernels": "gpu"}, "backend"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    run = torch.compile(Network(), backend=torch_backend, options=options)  # type: ignore[arg-type]
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message) as caught:
        run(torch.randn(2, 8))
    assert isinstance(caught.value.inner_exception, ConfigError)


def test_fake_parameters_are_refused() -> None:
    with torch._subclasses.FakeTensorMode(), pytest.raises(CaptureError, match="optimize_ddp"):
        torch_backend(torch.fx.symbolic_trace(nn.ReLU()), [torch.empty(2)])


def test_the_entry_point_names_the_backend() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    entry = text.partition("torch_dynamo_backends]\n")[2].partition("\n")[0]
    name, _, target = entry.replace('"', "").partition(" = ")
    module_name, _, function = target.partition(":")
    assert name == "nmcompile" and getattr(importlib.import_module(module_name), function) is torch_backend
