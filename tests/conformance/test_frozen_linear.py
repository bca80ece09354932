"""Frozen linear layers in one native call: bit for bit what the two separate kernels give for the rounded input."""

import pytest
import torch
from torch import Tensor

from nmcompile.backends.cpu.frozen_linear import FrozenLinear, frozen_linear
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.packed_integers import GridInput
from nmcompile.ir.operations import to_grid
from nmcompile.native import INSTRUCTION_SETS, kernels
from nmcompile.quantization import Grid
from tests.conformance.test_packed_integers import SHAPES, STEPS, grid_weight

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)
STEP = torch.tensor(0.31)


def layer_of(shape: tuple[int, int], granularity: str, signed: bool, bias: Tensor | None) -> FrozenLinear:
    example = GridInput(torch.zeros(1, shape[1]), STEP, Grid(4, signed))
    made = frozen_linear(grid_weight(*shape, granularity), example, bias)
    assert made is not None
    return made


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("granularity", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_size(shape: tuple[int, int], granularity: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmcompile.native.INSTRUCTION_SETS", (isa,))
    weight = grid_weight(*shape, granularity)
    for tokens in (0, 1, 2, 9):
        signed, bias = tokens % 3 == 0, torch.randn(shape[0]) if tokens % 2 else None
        x = torch.randn(tokens, shape[1])
        expected, found = torch.empty(tokens, shape[0]), torch.full((tokens, shape[0]), torch.nan)
        rounded = GridInput(to_grid(x, STEP, 4, signed), STEP, Grid(4, signed))
        assert weight.multiply(rounded, bias, expected)
        assert layer_of(shape, granularity, signed, bias).fill(x, found) and torch.equal(found, expected)


@pytest.mark.parametrize("signed", [False, True])
def test_inputs_are_rounded_as_the_grid_rounds(signed: bool) -> None:
    """Ties, numbers of any size and infinities; each weight meets an input of its own."""
    depth = 256
    halves = torch.arange(-40, 41) / 2 * STEP
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e30, -1e30, 1e-40, 3e38])
    near = torch.cat([halves, torch.nextafter(halves, halves + 1), torch.nextafter(halves, halves - 1)])
    x = torch.cat([near, special])
    x = torch.cat([x, torch.zeros(-len(x) % depth)]).view(-1, depth)
    integers = torch.zeros(depth, depth, dtype=torch.int8)
    integers.fill_diagonal_(1)
    packed = kernels.pack_integers(integers, 1)
    assert packed is not None
    grid = Grid(4, signed)
    layer = FrozenLinear(packed, torch.ones(depth), GridInput(x, STEP, grid), None)
    found = torch.empty_like(x)
    assert layer.fill(x, found)
    assert torch.equal(found, torch.clamp(torch.round(x / STEP), grid.low, grid.high))


@pytest.mark.parametrize("place", [(0, 0), (4, 259)])
def test_a_nan_has_no_integer(place: tuple[int, int]) -> None:
    x = torch.randn(5, 260)
    x[place] = torch.nan
    assert not layer_of((33, 260), "tensor", True, None).fill(x, torch.empty(5, 33))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    layer, x, threads = layer_of((515, 132), "tensor", True, None), torch.randn(5, 132), torch.get_num_threads()
    results = [torch.empty(5, 515) for _ in range(3)]
    for count, result in zip((1, 2, 5), results, strict=True):
        torch.set_num_threads(count)
        assert layer.fill(x, result)
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_operands_that_do_not_fit_are_refused() -> None:
    packed = kernels.pack_integers(torch.zeros(5, 8, dtype=torch.int8), 1)
    assert packed is not None
    for low, high, steps, bias in ((0, 16, 5, 5), (3, 2, 5, 5), (0, 15, 4, 5), (0, 15, 5, 4)):
        with pytest.raises(ValueError, match="do not fit"):
            kernels.FrozenLinear(packed, 1.0, low, high, torch.zeros(steps), torch.zeros(bias))


def test_a_step_that_is_not_finite_leaves_the_layer_to_its_values() -> None:
    weight = grid_weight(9, 36, "channel")
    weight.step[3] = torch.nan
    assert frozen_linear(weight, GridInput(torch.zeros(1, 36), STEP, Grid(4, True)), None) is None
