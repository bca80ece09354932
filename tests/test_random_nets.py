"""Small random nets: dense mode equals eager, pruned operands hold their pattern, and compiling can be undone."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig, NMPattern, Phase, presets
from nmcompile.ir.layers import ConvLayer, Layer
from nmcompile.ir.node_meta import kind_of, meta_of
from nmcompile.ir.plan import PlanRow
from nmcompile.layer_config import Pruning
from nmcompile.three_gemm.triple import GemmTriple

SDGP = LayerConfig(backward_gradient=Pruning("sdgp", NMPattern(2, 4)))
BATCH = LayerConfig(update_gradient=Pruning("mvue_approx", NMPattern(2, 4), "batch"))
FLAT = LayerConfig(update_gradient=Pruning("mvue", NMPattern(1, 2), "flat"))
CONFIGS = dict(presets) | {"sdgp": SDGP, "batch": BATCH, "flat": FLAT}
del CONFIGS["dense"]
WIDTHS = st.sampled_from([2, 4, 6, 8, 12, 16])
OPERANDS = {
    Phase.FORWARD: ("input", "weight"),
    Phase.BACKWARD: ("grad_output", "weight"),
    Phase.UPDATE: ("grad_output", "input"),
}
"""Names of the first two arguments of each GEMM."""

fixed = settings(deadline=None, derandomize=True, database=None)


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.branch(x)
        return y


@st.composite
def convolutions(draw: st.DrawFn, dims: int, width: int, new_width: int, kernel: int, stride: int) -> nn.Module:
    groups = draw(st.sampled_from([n for n in (1, 1, 2, 4, width) if width % n == 0 and new_width % n == 0]))
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    return kind(width, new_width, kernel, stride, kernel // 2, 1, groups, draw(st.booleans()))


@st.composite
def conv_nets(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Draw convs, norms, activations, pools and residual branches over 1 or 2 spatial dims, and a linear head."""
    dims, width = draw(st.integers(1, 2)), draw(WIDTHS)
    shape = draw(st.sampled_from([2, 3, 4, 8])), width, *(6, 5)[:dims]
    pools = [nn.MaxPool1d(2, 1), nn.AvgPool1d(2, 1)] if dims == 1 else [nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1)]
    body: list[nn.Module] = [draw(st.sampled_from(pools))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            branch = draw(convolutions(dims, width, width, draw(st.sampled_from([1, 3])), 1))
            body.append(Residual(nn.Sequential(nn.ReLU(), branch)))
        else:
            new_width = draw(WIDTHS)
            kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
            body.append(draw(convolutions(dims, width, new_width, kernel, stride)))
            width = new_width
        norms = [nn.BatchNorm1d(width) if dims == 1 else nn.BatchNorm2d(width), nn.GroupNorm(2, width), nn.Identity()]
        body += [draw(st.sampled_from(norms)), draw(st.sampled_from([nn.ReLU(), nn.GELU(), nn.Sigmoid()]))]
    pool = nn.AdaptiveAvgPool1d(1) if dims == 1 else nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*body, pool, nn.Flatten(), nn.Linear(width, draw(WIDTHS))), shape


@st.composite
def linear_nets(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Draw linears over one or two dims of tokens, norms, activations and residual branches."""
    width = draw(WIDTHS)
    shape = *draw(st.sampled_from([(3,), (8,), (2, 3), (4, 2)])), width
    body: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        has_bias = draw(st.booleans())
        if draw(st.booleans()):
            body.append(Residual(nn.Sequential(nn.ReLU(), nn.Linear(width, width, has_bias))))
        else:
            new_width = draw(WIDTHS)
            body.append(nn.Linear(width, new_width, has_bias))
            width = new_width
        body.append(draw(st.sampled_from([nn.LayerNorm(width), nn.Identity()])))
        body.append(draw(st.sampled_from([nn.ReLU(), nn.Tanh()])))
    return nn.Sequential(*body), shape


def seeded(drawn: tuple[nn.Module, tuple[int, ...]]) -> tuple[nn.Module, Tensor]:
    """Return the net with parameters, and an input, that do not depend on earlier draws."""
    net, shape = drawn
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net, torch.randn(shape)


nets = st.one_of(conv_nets(), linear_nets()).map(seeded)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output and every gradient."""
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    return [output, *torch.autograd.grad(output.square().sum(), [leaf, *model.parameters()])]


@given(nets)
@settings(fixed, max_examples=100)
def test_dense_mode_is_eager_bit_for_bit(drawn: tuple[nn.Module, Tensor]) -> None:
    net, x = drawn
    compiled = nmcompile.compile(net, "dense")
    assert all(torch.equal(*pair) for pair in zip(results(compiled, x), results(net, x), strict=True))


class Recorder(fx.Interpreter):
    """An interpreter that keeps the operands that the graph's GEMM reads."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.operands: tuple[Any, ...] = ()

    def run_node(self, n: fx.Node) -> Any:
        if kind_of(n) == "gemm":
            self.operands = self.fetch_args_kwargs_from_env(n)[0]
            if (fused := meta_of(n).fused) is not None:
                pruned = fused.operand(*self.operands)
                is_update = meta_of(n).phase is Phase.UPDATE
                self.operands = (pruned, self.operands[1]) if is_update else (self.operands[0], pruned)
        return super().run_node(n)


def recorded_step(model: nn.Module, x: Tensor) -> Iterator[tuple[Layer, PlanRow, np.ndarray[Any, Any]]]:
    """Return each planned row with the operand that its GEMM read in one training step."""
    seen: list[tuple[GemmTriple, Phase, tuple[Any, ...]]] = []

    def run(triple: GemmTriple, phase: Phase, values: dict[str, Tensor | None]) -> Any:
        recorder = Recorder(triple.graphs[phase])
        output = recorder.run(*(values[name] for name in triple.placeholders[phase]))
        seen.append((triple, phase, recorder.operands))
        return output

    with patch.object(GemmTriple, "run", run):
        results(model, x)
    for triple, phase, operands in seen:
        for row in triple.graphs.plan.rows_of(phase):
            if row.is_sparse:
                assert row.operand is not None
                yield triple.layer, row, operands[OPERANDS[phase].index(row.operand)].detach().numpy()


def lines(layer: Layer, row: PlanRow, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the operand as (lines, elements along the stated axis)."""
    is_conv = isinstance(layer, ConvLayer)
    assert row.pattern is not None
    if row.operand == "weight" and row.axis == "out":
        x, axis = x.reshape(layer.groups, -1, *x.shape[1:]), 1
    elif row.axis in ("in", "out"):
        axis = 1 if is_conv or row.operand == "weight" else x.ndim - 1
    elif row.axis == "batch" or (row.axis == "auto" and is_conv and len(x) % row.pattern.block == 0):
        axis = 0
    else:
        x, axis = (np.moveaxis(x, 1, -1) if is_conv else x).reshape(-1, x.shape[1 if is_conv else -1]), 0
    return np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])


def kept(layer: Layer, row: PlanRow, x: np.ndarray[Any, Any]) -> list[int]:
    """Return the number of non-zeros in each block."""
    assert row.pattern is not None
    block = row.pattern.block
    return [
        int(np.count_nonzero(line[start : start + block]))
        for line in lines(layer, row, x)
        for start in range(0, len(line), block)
    ]


@pytest.mark.parametrize("mode", CONFIGS)
@given(drawn=nets)
@settings(fixed, max_examples=30)
def test_every_pruned_operand_holds_its_pattern(mode: str, drawn: tuple[nn.Module, Tensor]) -> None:
    net, x = drawn
    config = CompileConfig(ends="sparse", layers={"_default": CONFIGS[mode]})
    compiled = nmcompile.compile(net, "dense", config=config)
    is_quantized = mode == "inference"
    if is_quantized:
        nmcompile.calibrate(compiled, [x])
    steps = list(recorded_step(compiled, x))
    plans = [layer.plan for layer in nmcompile.inspect(compiled).layers]
    assert {row for _, row, _ in steps} == {row for plan in plans for row in plan.rows if row.is_sparse}
    for layer, row, operand in steps:
        counts = kept(layer, row, operand)
        assert row.pattern is not None
        assert max(counts) <= row.pattern.n_keep
        # The weights are drawn without zeros, so a mask keeps all that it may; a grid rounds some of it to zero.
        assert row.operand != "weight" or is_quantized or min(counts) == row.pattern.n_keep


UNDONE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled once": lambda net: nmcompile.compile(net, "training"),
    "compiled again": lambda net: nmcompile.compile(nmcompile.compile(net, "weights"), "activations"),
}


@pytest.mark.parametrize("how", UNDONE)
@given(drawn=nets)
@settings(fixed, max_examples=30)
def test_decompile_undoes_compile(how: str, drawn: tuple[nn.Module, Tensor]) -> None:
    net, x = drawn
    plain = nmcompile.decompile(UNDONE[how](net))
    assert [type(one) for one in plain.modules()] == [type(one) for one in net.modules()]
    assert [list(vars(one)) for one in plain.modules()] == [list(vars(one)) for one in net.modules()]
    assert all(mine is given for mine, given in zip(plain.parameters(), net.parameters(), strict=True))
    assert all(torch.equal(*pair) for pair in zip(results(plain, x), results(net, x), strict=True))
