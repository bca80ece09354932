"""Single convolutions in integers against exact arithmetic in float64, on every instruction set of this machine."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nmcompile.native import INSTRUCTION_SETS, MISSING, kernels

pytestmark = pytest.mark.skipif(bool(MISSING), reason="no native kernels")
Two = tuple[int, int]
STEP = 0.37
LAST = INSTRUCTION_SETS[0] if INSTRUCTION_SETS else "", 1


class Case(NamedTuple):
    """A convolution of a (samples, channels, height, width) input."""

    size: tuple[int, int, int, int]
    outs: int
    kernel: Two
    stride: Two = (1, 1)
    padding: Two = (0, 0)
    dilation: Two = (1, 1)
    groups: int = 1
    low: int = 0
    high: int = 15

    def weights(self) -> Tensor:
        """Return 2:4 integers (out, height, width, in / groups)."""
        fours = torch.randint(-7, 8, (self.outs, *self.kernel, self.size[1] // self.groups // 4, 4))
        return (fours * (torch.rand(fours.shape).argsort(-1) < 2)).flatten(3).to(torch.int8)

    def layer(self, weights: Tensor) -> "kernels.IntegerLayer":
        return kernels.integer_layer(weights, self.groups, self.stride, self.dilation, 15)

    def sums(self, q: Tensor, weights: Tensor) -> Tensor:
        taps = weights.permute(0, 3, 1, 2).double()
        return F.conv2d(q.double(), taps, None, self.stride, self.padding, self.dilation, self.groups)


CASES = [
    Case((1, 16, 9, 7), 32, (3, 3), padding=(1, 1)),
    Case((2, 20, 9, 7), 24, (3, 3), (2, 2), (1, 1), low=-7, high=7),
    Case((2, 32, 6, 11), 17, (3, 5), (2, 1), (0, 3), (1, 2), low=-7, high=7),
    Case((2, 64, 5, 6), 48, (3, 3), padding=(2, 0), groups=2, high=7),
    Case((3, 48, 13, 5), 16, (1, 1), (1, 3)),
    Case((2, 24, 1, 70), 24, (1, 5), (1, 2), (0, 4), (1, 2), 2, low=-1, high=1),
    Case((2, 4, 3, 3), 5, (1, 1)),
    Case((5, 72, 1, 1), 40, (1, 1)),
]


def name(case: Case) -> str:
    return f"{'x'.join(map(str, case.size))}-{case.outs}"


def laid_out(x: Tensor, is_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_it_equals_exact_arithmetic(case: Case, isa: str) -> None:
    torch.manual_seed(0)
    weights, x = case.weights(), 3 * torch.randn(case.size)
    layer, q = case.layer(weights), (x / STEP).round().clamp(case.low, case.high)
    steps, bias = 0.01 * torch.randn(case.outs), torch.randn(case.outs)
    scaled = case.sums(q, weights).float() * steps.view(-1, 1, 1)
    for number, b in enumerate((None, bias)):
        expected = scaled if b is None else scaled + b.view(-1, 1, 1)
        for reads_last in (False, True):
            input, writes_last = laid_out(x, reads_last), reads_last == bool(number)
            found = laid_out(torch.full_like(expected, torch.nan), writes_last)
            for images, is_exact in ((input, False), (laid_out(q * STEP, reads_last), True)):
                found.fill_(torch.nan)
                grid = STEP, case.low, case.high, is_exact, False, case.padding
                assert kernels.convolve_integers(layer, images, *grid, steps, b, found, isa, 1 + 2 * number)
                assert torch.equal(found, expected)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_codes_are_pruned_as_the_graph_prunes(isa: str) -> None:
    """Many equal codes, of which the first stay; the oracle orders them by value and place."""
    for case in (case for case in CASES if case.low == 0 and case.size[1] % 8 == 0):
        torch.manual_seed(0)
        weights, x = case.weights(), 3 * torch.randn(case.size).abs()
        layer, q = case.layer(weights), (x / STEP).round().clamp(0, case.high)
        eights = q.movedim(1, -1).unflatten(-1, (-1, 8))
        ranks = (-eights).argsort(dim=-1, stable=True).argsort(-1)
        kept = (eights * (ranks < 4)).flatten(-2).movedim(-1, 1)
        expected = case.sums(kept, weights).float()
        for is_last in (False, True):
            found, grid = torch.full_like(expected, torch.nan), (STEP, 0, case.high)
            operands = *grid, False, True, case.padding, torch.ones(case.outs), None, found, isa, 2
            assert kernels.convolve_integers(layer, laid_out(x, is_last), *operands)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_inputs_are_rounded_as_the_grid_rounds(isa: str, is_last: bool) -> None:
    """Ties, numbers of any size and infinities, each in a channel and a pixel of its own."""
    halves = torch.arange(-40, 41) / 2 * STEP
    near = torch.cat([halves, torch.nextafter(halves, halves + 1), torch.nextafter(halves, halves - 1)])
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e30, -1e30, 1e-40, 3e38])
    x = torch.cat([near, special, torch.zeros(1)]).view(1, 6, 6, 7)
    layer = kernels.integer_layer(torch.eye(6, dtype=torch.int8).view(6, 1, 1, 6), 1, (1, 1), (1, 1), 15)
    for low, high in ((0, 15), (-7, 7)):
        found = torch.empty(x.shape)
        operands = STEP, low, high, False, False, (0, 0), torch.ones(6), None, found, isa, 1
        assert kernels.convolve_integers(layer, laid_out(x, is_last), *operands)
        assert torch.equal(found, torch.clamp(torch.round(x / STEP), low, high))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_value_that_is_no_integer_is_refused_wherever_it_is(isa: str) -> None:
    case = CASES[0]
    layer, y = case.layer(case.weights()), torch.empty(1, 32, 9, 7)
    good = torch.randint(0, 16, case.size) * torch.tensor(STEP)

    def run(x: Tensor, exact: bool) -> bool:
        operands = STEP, 0, 15, exact, False, (1, 1), torch.ones(32), None, y, isa, 2
        return kernels.convolve_integers(layer, x, *operands)

    for is_last in (False, True):
        assert run(laid_out(good, is_last), exact=True)
        for place in ((0, 0, 0, 0), (0, 15, 8, 6), (0, 7, 4, 0)):
            for value in (torch.nan, torch.inf, 16 * STEP, -STEP, 0.5 * STEP, 3.001 * STEP):
                x = laid_out(good, is_last).clone()
                x[place] = value
                assert not run(x, exact=True)
                assert run(x, exact=False) == (value == value)


def test_operands_that_do_not_fit_are_refused() -> None:
    case = CASES[0]
    layer, x = case.layer(case.weights()), torch.zeros(case.size)

    def run(
        x: Tensor = x,
        y: Tensor | tuple[int, ...] = (1, 32, 9, 7),
        step: float = STEP,
        low: int = 0,
        high: int = 15,
        padding: Two = (1, 1),
        steps: int = 32,
        bias: int = 32,
        prunes: bool = False,
    ) -> bool:
        y = torch.empty(y) if isinstance(y, tuple) else y
        factors = torch.ones(steps), torch.ones(bias)
        return kernels.convolve_integers(layer, x, step, low, high, False, prunes, padding, *factors, y, *LAST)

    assert run()
    wrong: dict[str, list[Callable[[], bool]]] = {
        "another size": [
            lambda: run(y=(1, 32, 9, 8)),
            lambda: run(y=(1, 31, 9, 7)),
            lambda: run(y=(2, 32, 9, 7)),
            lambda: run(padding=(1, 0)),
        ],
        "contiguous": [
            lambda: run(x.transpose(2, 3).contiguous().transpose(2, 3)),
            lambda: run(y=torch.empty(1, 32, 9, 8)[..., 1:]),
            lambda: run(torch.zeros(1, 16, 9, 1).expand(case.size)),
        ],
        "channels are not": [lambda: run(torch.zeros(1, 12, 9, 7))],
        "no image": [lambda: run(x[:0], (0, 32, 9, 7)), lambda: run(x[:, :, :0])],
        "larger than the image": [lambda: run(x[:, :, :2], padding=(0, 0))],
        "padding is negative": [lambda: run(padding=(-1, 0))],
        "too large": [lambda: run(padding=(2**40, 2**40))],
        "each out-channel": [lambda: run(steps=31), lambda: run(bias=33)],
        "grid": [
            lambda: run(step=0.0),
            lambda: run(step=-1.0),
            lambda: run(step=float("nan")),
            lambda: run(high=16),
            lambda: run(low=1),
            lambda: run(low=-8, high=8),
            lambda: run(low=-(2**31), high=2**31 - 1),
        ],
        "pruned are codes": [lambda: run(low=-7, high=7, prunes=True)],
    }
    for message, calls in wrong.items():
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()
    for bad in (x.double(), x[0], None):
        with pytest.raises(TypeError):
            run(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="instruction set"):
        kernels.convolve_integers(
            layer, x, STEP, 0, 15, False, False, (1, 1), torch.ones(32), None, torch.empty(1, 32, 9, 7), "v9", 1
        )
    with pytest.raises(ValueError, match="window is too large"):
        kernels.integer_layer(case.weights(), 1, (1, 1), (2**40, 1), 15)
