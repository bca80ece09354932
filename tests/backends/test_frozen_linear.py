"""Frozen linear layers take a shortcut: the same results, and none once anything that they depend on is written."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig, Phase
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.training import clips
from nmcompile.training.find_masks import masks_of

pytestmark = [
    pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason),
    pytest.mark.usefixtures("integers"),
]


def model(backend: str = "cpu", clip: str = "mse") -> tuple[nn.Sequential, Tensor]:
    """Return two layers: the first has a signed input and a bias, the second an input that is not negative."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 12, bias=False)), torch.randn(5, 24)
    every = LayerConfig(nmcompile.presets["inference"].weight, weight_bits=4, input_bits=4)
    config = CompileConfig(layers={"_default": every}, ends="sparse", clip=clip)
    compiled = nmcompile.compile(net, "inference", args=(x,), config=config, calibration=[x], backend=backend)
    assert isinstance(compiled, nn.Sequential)
    return compiled.eval(), x


def frozen(clip: str = "mse") -> tuple[nn.Sequential, Tensor]:
    """Return a frozen model whose layers have their shortcuts."""
    compiled, x = model(clip=clip)
    nmcompile.freeze(compiled)
    with torch.no_grad():
        compiled(x)
    return compiled, x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_second_call_of_equal_size_takes_it(mode: type, taken: list[str]) -> None:
    (compiled, x), (expected, _) = frozen(), model("reference")
    with mode():
        for y in (x, x.flip(0), x[:2], x[:2], x[None], x[0], x[:0]):
            torch.testing.assert_close(compiled(y), expected(y))
        assert taken.count("0") == taken.count("2") >= 3
        taken.clear()
        assert torch.equal(compiled(x), compiled(x)) and taken == ["0", "2"] * 2
    assert nmcompile.inspect(compiled).layers[0].choices[Phase.FORWARD].kernel == "integers"


@torch.no_grad()
def test_it_computes_what_the_graph_computes(taken: list[str]) -> None:
    compiled, x = frozen()
    unfrozen = copy.deepcopy(compiled)
    for _ in range(20):
        x = 3 * torch.randn(5, 24)
        assert torch.equal(compiled(x), unfrozen(x))
    assert len(taken) == 40


def load(compiled: nn.Sequential) -> None:
    compiled.load_state_dict({name: 2 * value for name, value in compiled.state_dict().items()})


def load_sparse(compiled: nn.Sequential) -> None:
    state = nmcompile.sparse_state_dict(compiled)
    for name in [name for name in state if name.endswith(".clip")]:
        state[name] = 0.5 * state[name]
    nmcompile.load_sparse_state_dict(compiled, state)


def step(compiled: nn.Sequential) -> None:
    for parameter in compiled.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(compiled.parameters(), 0.1).step()


def step_clips(compiled: nn.Sequential) -> None:
    found = clips(compiled)
    assert found
    for clip in found:
        clip.grad = torch.ones_like(clip)
    torch.optim.SGD(found, 0.1).step()


def calibrate(compiled: nn.Sequential) -> None:
    nmcompile.calibrate(compiled, [0.3 * torch.randn(5, 24, generator=torch.Generator().manual_seed(7))])


def write_bias(compiled: nn.Sequential) -> None:
    compiled[0].bias.add_(1)  # type: ignore[operator]


def write_mask(compiled: nn.Sequential) -> None:
    (mask,) = masks_of(compiled[0]).values()
    mask.tensor.copy_(mask.tensor.roll(4, 1))


def put_another_in_place(compiled: nn.Sequential) -> None:
    compiled[0].weight = nn.Parameter(torch.randn(20, 24, generator=torch.Generator().manual_seed(3)))


def double(compiled: nn.Sequential) -> None:
    compiled.double()
    compiled.float()
    compiled[0].bias.mul_(2)  # type: ignore[operator]


WRITES = [load, load_sparse, step, step_clips, calibrate, write_bias, write_mask, put_another_in_place, double]


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES)
def test_nothing_stale_is_read(write: Callable[[nn.Sequential], None]) -> None:
    clip = "pact" if write is step_clips else "mse"
    (compiled, x), (reference, _) = frozen(clip), model("reference", clip)
    before = compiled(x)
    write(compiled)
    write(reference)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), reference(x))
    assert not torch.allclose(before, compiled(x))
    nmcompile.freeze(compiled)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), reference(x))


def test_gradients_end_it() -> None:
    (compiled, x), (reference, _) = frozen(), model("reference")
    results = []
    for net in (compiled, reference):
        net(x).square().sum().backward()
        results.append(net[0].weight.grad)
    torch.testing.assert_close(*results)


@torch.no_grad()
def test_what_it_does_not_take_runs_on_the_graph(taken: list[str]) -> None:
    (compiled, x), (reference, _) = frozen(), model("reference")
    taken.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
    x = x.requires_grad_()
    with torch.enable_grad():
        torch.testing.assert_close(compiled(x), reference(x))
    assert not taken
    x = x.detach()
    torch.testing.assert_close(compiled(x.t().contiguous().t()), reference(x))
    x[1, 2] = torch.nan
    torch.testing.assert_close(compiled(x), reference(x), equal_nan=True)
    assert taken.count("0") == 0
    with pytest.raises((RuntimeError, ValueError), match=r"fit|cannot be multiplied"):
        compiled(torch.randn(5, 28))
    weight = compiled[0].weight
    assert isinstance(weight, Tensor)
    functional = {"0.weight": 2 * weight}
    torch.testing.assert_close(
        torch.func.functional_call(compiled, functional, x),
        torch.func.functional_call(reference, functional, x),
        equal_nan=True,
    )


@torch.no_grad()
def test_comparison_looks_into_layers_that_have_one() -> None:
    compiled, x = frozen()
    report = nmcompile.compare(nmcompile.decompile(copy.deepcopy(compiled)), compiled, x)
    assert len(report.layers) == 2


@torch.no_grad()
def test_copies_have_none_of_it(taken: list[str]) -> None:
    compiled, x = frozen()
    expected = compiled(x)
    taken.clear()
    for replica in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        torch.testing.assert_close(replica(x), expected)
    assert not taken


class Graphs:
    """A backend of torch.compile that runs graphs eagerly and keeps them."""

    def __init__(self) -> None:
        self.found: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.found.append(graph)
        return graph.forward

    def operators(self) -> list[str]:
        return [str(n.target) for n in self.found[-1].graph.nodes if "frozen_layer" in str(n.target)]


@torch.no_grad()
def test_in_a_graph_of_torch_compile_a_layer_is_one_operator(taken: list[str]) -> None:
    torch._dynamo.reset()
    (compiled, x), (reference, _) = frozen(), model("reference")
    graphs = Graphs()
    run = torch.compile(compiled, backend=graphs, fullgraph=True)
    torch.testing.assert_close(run(x), reference(x))
    assert len(graphs.operators()) == 2 and taken == ["0", "2"]
    for write in (write_mask, calibrate, load):
        for net in (compiled, reference):
            write(net)
        torch.testing.assert_close(run(x), reference(x))
    assert not graphs.operators()  # loading has ended the promise, so the layers were traced anew


def test_a_graph_of_autograds_compiler_runs_it(taken: list[str]) -> None:
    torch._dynamo.reset()
    (compiled, x), (reference, _) = frozen(), model("reference")
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(compiled, backend="aot_eager", fullgraph=True)(x), reference(x))
    assert taken == ["0", "2"]


def test_the_operator_is_well_formed() -> None:
    compiled, x = frozen()
    layer: Any = compiled[0]
    with torch.no_grad():
        arguments = x, layer.weight.detach(), layer.bias.detach(), layer.three_gemms[""].serial
        checks = "test_schema", "test_faketensor"
        torch.library.opcheck(torch.ops.nmcompile.frozen_layer.default, arguments, test_utils=checks)


@torch.no_grad()
def test_with_export_the_graph_is_seen() -> None:
    compiled, x = frozen()
    program = torch.export.export(compiled, (x,))
    assert "frozen_layer" not in program.graph_module.code
