"""Products of packed 4-bit integers against sums in float64: every instruction set, partial blocks, many tokens."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.packed_integers import GridInput, LinearGridWeight
from nmcompile.ir.operations import apply_mask, to_grid
from nmcompile.native import INSTRUCTION_SETS, kernels
from nmcompile.quantization import Grid, integers
from tests.conformance.gemms import UNIT

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)
SHAPES = [(1, 4), (3, 8), (4, 128), (5, 132), (13, 124), (33, 260), (130, 516)]  # out and in
TOKENS = [1, 2, 3, 4, 5, 7, 8, 9, 17, 21]
STEPS = "tensor", "channel"


def grid_weight(out_features: int, in_features: int, granularity: str, transposed: bool = False) -> LinearGridWeight:
    """Return a weight with two, one and no kept elements in its fours, and values that the grid clips."""
    torch.manual_seed(out_features * 1000 + in_features)
    weight = torch.randn(out_features, in_features)
    mask = (torch.rand(out_features, in_features // 4, 4).argsort(-1) < 2).flatten(1)
    weight[torch.rand_like(weight) < 0.2] = 0
    step = torch.rand(out_features, 1).add(0.1) if granularity == "channel" else torch.tensor(0.23)
    if transposed:
        weight, mask, step = weight.t().contiguous(), mask.t().contiguous(), step.t() if step.dim() else step
    return LinearGridWeight(weight, mask, step, 4, transposed)


def grid_input(*shape: int, signed: bool) -> GridInput:
    """Return an input with values that the grid clips."""
    step, grid = torch.tensor(0.31), Grid(4, signed)
    return GridInput(to_grid(3 * torch.randn(shape), step, 4, signed), step, grid)


def product(weight: LinearGridWeight, x: GridInput, bias: Tensor | None) -> Tensor:
    output = torch.full((*x.values.shape[:-1], weight.shape[0]), torch.nan)
    assert weight.multiply(x, bias, output)
    return output


def check(weight: LinearGridWeight, x: GridInput, bias: Tensor | None) -> None:
    """Compare with exact integer sums: only the two steps, their product with the sum, and the bias round."""
    steps = weight.step.double(), x.step.double()
    integers, inputs = ((v.double() / s).round() for v, s in zip((weight.values(), x.values), steps, strict=True))
    matrix = integers.t() if weight.transposed else integers
    total = inputs @ matrix.t() * (steps[0].reshape(-1) * steps[1])
    shift = torch.zeros(weight.shape[0]) if bias is None else bias
    error = (product(weight, x, bias).double() - (total + shift)).abs()
    assert bool((error <= 4 * UNIT * (total.abs() + shift.abs())).all())
    # The values themselves are rounded multiples of the step: one rounding for each product.
    values = weight.values().double().t() if weight.transposed else weight.values().double()
    dense, magnitude = x.values.double() @ values.t() + shift, x.values.double().abs() @ values.t().abs() + shift.abs()
    assert bool(((product(weight, x, bias) - dense).abs() <= 4 * UNIT * magnitude).all())


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("granularity", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_size(shape: tuple[int, int], granularity: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmcompile.native.INSTRUCTION_SETS", (isa,))
    weight = grid_weight(*shape, granularity)
    for tokens in TOKENS:
        x = grid_input(tokens, shape[1], signed=tokens % 3 == 0)
        check(weight, x, torch.randn(shape[0]) if tokens % 2 else None)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("granularity", STEPS)
def test_transposed_and_many_dims(granularity: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmcompile.native.INSTRUCTION_SETS", (isa,))
    weight = grid_weight(12, 20, granularity, transposed=True)
    for shape in ((2, 3, 20), (20,), (0, 20)):
        check(weight, grid_input(*shape, signed=True), torch.randn(12))
    x = grid_input(20, 6, signed=False)
    check(weight, x._replace(values=x.values.t()), None)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_integer_in_every_place(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of integers have no rounding: each weight meets an input of its own."""
    monkeypatch.setattr("nmcompile.native.INSTRUCTION_SETS", (isa,))
    rows, depth = 15, 256
    weight = torch.zeros(rows, depth)
    for row in range(rows):
        for start, (first, second) in enumerate(combinations(range(4), 2)):
            fours = torch.arange((start + row) % 6, depth // 4, 6)
            weight[row, 4 * fours + first] = row - 7
            weight[row, 4 * fours + second] = 7 - row // 2
    on_grid = LinearGridWeight(weight, torch.ones_like(weight, dtype=torch.bool), torch.tensor(1.0), 4, False)
    for signed in (False, True):
        one = GridInput(torch.eye(depth), torch.tensor(1.0), Grid(4, signed))
        assert torch.equal(product(on_grid, one, None), weight.t())


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_largest_sums(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmcompile.native.INSTRUCTION_SETS", (isa,))
    depth = 2**17
    weight = torch.tensor([[-7.0], [7.0]]) * torch.tensor([0, 1, 1, 0]).repeat(depth // 4)
    on_grid = LinearGridWeight(weight, weight != 0, torch.tensor(1.0), 4, False)
    for signed, largest in ((False, 15), (True, 7), (True, -7)):
        x = GridInput(torch.full((1, depth), float(largest)), torch.tensor(1.0), Grid(4, signed))
        expected = torch.tensor([[-1.0, 1.0]]) * (7 * largest * depth // 2)
        assert torch.equal(product(on_grid, x, None), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.1])
def test_an_input_that_is_not_on_its_grid_has_no_integers(value: float) -> None:
    x = grid_input(3, 36, signed=True)
    x.values[1, 2] = value
    assert not grid_weight(9, 36, "tensor").multiply(x, None, torch.empty(3, 9))


def test_the_weights_are_those_of_the_graph() -> None:
    weight = grid_weight(9, 36, "channel")
    graph = to_grid(apply_mask(weight.weight, weight.mask), weight.step, 4, True)
    assert torch.equal(weight.values(), graph)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_results_do_not_depend_on_the_number_of_threads(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmcompile.native.INSTRUCTION_SETS", (isa,))
    weight, x, threads = grid_weight(203, 132, "tensor"), grid_input(5, 132, signed=True), torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(product(weight, x, None))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_three_bits_for_each_weight() -> None:
    packed = kernels.pack_integers(torch.zeros(64, 256, dtype=torch.int8), 1)
    assert packed is not None and packed.bytes == 64 * 256 * 3 / 8


@pytest.mark.parametrize("row", [[1, 2, 3, 0], [8, 0, 0, 0], [0, 0, -8, 0]])
def test_what_does_not_fit_is_not_packed(row: list[int]) -> None:
    integers = torch.zeros(5, 132, dtype=torch.int8)
    integers[4, -4:] = torch.tensor(row, dtype=torch.int8)
    assert kernels.pack_integers(integers, 2) is None


@pytest.mark.parametrize("what", ["a NaN", "three of four"])
def test_a_weight_that_has_no_packed_integers(what: str) -> None:
    weight = grid_weight(8, 16, "tensor")
    if what == "a NaN":
        weight.weight[weight.mask.nonzero().unbind(1)] = torch.nan
    else:
        weight.weight[0, :3], weight.mask[0, :3] = 1, True
    assert not weight.multiply(grid_input(2, 16, signed=True), None, torch.empty(2, 8))


def test_operands_that_do_not_fit_are_refused() -> None:
    packed = kernels.pack_integers(torch.zeros(5, 8, dtype=torch.int8), 1)
    assert packed is not None
    codes = torch.zeros(2, 128, dtype=torch.uint8)
    good: dict[str, Any] = {"input": codes, "input_zero": 0, "steps": torch.zeros(5), "bias": None}
    good |= {"output": torch.empty(2, 5), "isa": INSTRUCTION_SETS[-1], "threads": 1}
    bad = {"input": codes[:, :8].clone(), "steps": torch.zeros(4), "bias": torch.zeros(4)}
    for name, tensor in bad.items():
        with pytest.raises(ValueError, match="do not fit"):
            kernels.multiply_integers(packed, **good | {name: tensor})
    with pytest.raises(ValueError, match="multiple of four"):
        kernels.pack_integers(torch.zeros(5, 6, dtype=torch.int8), 1)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 127), (2, 5, 300)])
def test_codes_are_the_integers_of_the_grid(shape: tuple[int, ...], signed: bool) -> None:
    for exponent in (-30, -3, 0, 20):
        step, grid = torch.rand(()).add(0.5) * 2.0**exponent, Grid(4, signed)
        values = to_grid(8 * step * torch.randn(shape), step, 4, signed)
        codes = GridInput(values, step, grid).codes()
        assert codes is not None and codes.shape[1] % kernels.INTEGERS_DEPTH == 0
        expected = (integers(values, step, grid) - grid.low).to(torch.uint8).reshape(-1, shape[-1])
        assert torch.equal(codes[:, : shape[-1]], expected) and not codes[:, shape[-1] :].any()


@pytest.mark.parametrize("change", ["nan", "inf", "-inf", "half", "ulp", "high", "low", "huge"])
def test_values_that_are_no_steps_have_no_codes(change: str) -> None:
    step, grid = torch.tensor(0.31), Grid(4, signed=False)
    values = torch.arange(16).float().repeat(20) * step
    assert GridInput(values, step, grid).codes() is not None
    stranger = {"half": 0.5 * 0.31, "ulp": float(torch.nextafter(values[3], values[4])), "high": float(16 * step)}
    stranger |= {"low": -0.31, "huge": 1e30}
    values[123] = stranger[change] if change in stranger else float(change)
    assert GridInput(values, step, grid).codes() is None
