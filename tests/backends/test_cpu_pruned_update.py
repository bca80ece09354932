"""The update GEMM that prunes dY while packing it, compared with pruning first: the same bit for bit."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile.backends.cpu.gemm import Geometry, sparse_pruned_update, sparse_update
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.linear import linear_pruned_weight_gradient, linear_weight_gradient
from nmcompile.backends.cpu.prune import prune_natively
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.custom_op import operator_of
from nmcompile.ir.choice import Choice
from nmcompile.pruning import NMPattern

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)

RULES = [("mvue", 2, 4), ("mvue", 1, 2), ("mvue_approx", 2, 4), ("greedy", 2, 4)]
KEY = torch.tensor(0x1234_5678_9ABC_DEF)
run = partial(linear_pruned_weight_gradient, axis="auto", key=KEY, transposed=False, slot="a")


@pytest.fixture(params=["sparse", "dense"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice(request.param, "the test asks for it"))
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (1, 5), (7, 33), (130, 300), (261, 129)], ids=str)
def test_pruned_on_the_way(shape: tuple[int, int], rule: tuple[str, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    operator, n, m = rule
    dy, x = torch.randn(shape, dtype=dtype), torch.randn(shape[0], 170, dtype=dtype)
    found, expected = (torch.full((shape[1], 170), torch.nan, dtype=dtype) for _ in range(2))
    assert sparse_pruned_update(dy, x, found, operator, NMPattern(n, m), KEY)
    pruned = prune_natively(dy, operator, n, m, "flat", -1, KEY)
    assert sparse_update(pruned, x, expected, Geometry(), "flat", m)
    assert found.equal(expected) and found.ne(0).any()


def test_rows_of_a_wider_matrix() -> None:
    torch.manual_seed(1)
    wide, x = torch.randn(100, 90), torch.randn(100, 20)
    dy = wide[:, 10:60]
    found, expected = torch.empty(50, 20), torch.empty(50, 20)
    assert sparse_pruned_update(dy, x, found, "mvue", NMPattern(2, 4), KEY)
    assert sparse_pruned_update(dy.contiguous(), x, expected, "mvue", NMPattern(2, 4), KEY)
    assert found.equal(expected)


@pytest.mark.parametrize("axis", ["auto", "flat", "batch"])
@pytest.mark.parametrize("shape", [(4, 9, 24), (36, 24)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_operator_takes_what_pruning_and_the_plain_one_take(
    axis: str, shape: tuple[int, ...], transposed: bool, kernel: str
) -> None:
    torch.manual_seed(2)
    plain = torch.randn(shape)
    for dy in (plain, plain.mT.contiguous().mT, plain[..., :1].expand(shape)):
        x = torch.randn(*shape[:-1], 16)
        found = run(dy, x, "mvue", 2, 4, axis=axis, transposed=transposed)
        pruned = prune_natively(dy, "mvue", 2, 4, axis, -1, KEY)
        assert found.equal(linear_weight_gradient(pruned, x, transposed, axis, 4, "a"))


def test_a_block_with_a_nan_goes_the_dense_way(kernel: str) -> None:
    dy, x = torch.ones(8, 4), torch.ones(8, 3)
    dy[2, 1] = torch.nan
    found = run(dy, x, "greedy", 2, 4, key=None)
    assert found[1].isnan().all() and found[[0, 2, 3]].eq(4).all()


def test_operator_keeps_the_rules_of_custom_operators() -> None:
    dy, x = torch.randn(8, 12), torch.randn(8, 16)
    torch.library.opcheck(operator_of(linear_pruned_weight_gradient), (dy, x, "mvue", 2, 4, "auto", KEY, False, "a"))


def test_graphs_say_that_the_update_prunes() -> None:
    model = nmcompile.compile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), "training")
    layer = nmcompile.inspect(model).layer("1")
    assert layer.kernels[nmcompile.Phase.UPDATE] == "prune: cpu, gemm: cpu, bias: reference"
    assert "cpu_linear_pruned_weight_gradient" in str(layer.graphs)

    def step() -> None:
        model(torch.randn(8, 8)).sum().backward()

    checks = nmcompile.verify(model, step=step).checks
    assert any(check.operand == "grad_output" and check.violations == 0 for check in checks)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_steps_are_those_of_the_reference() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))
    x, config = torch.randn(2, 8, 16), nmcompile.CompileConfig(ends="sparse")

    def steps(backend: str) -> list[Tensor]:
        torch.manual_seed(5)
        model = nmcompile.compile(copy.deepcopy(net), "training", config=config, backend=backend)
        return gradients(model, x)

    torch.testing.assert_close(steps("cpu"), steps("reference"))
