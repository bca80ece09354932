"""Kernels of networks in integers against exact arithmetic in float64, on every instruction set of this machine."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nmcompile.native import INSTRUCTION_SETS, MISSING, kernels

Image = tuple[int, int, int, int, int, int, int, int]
pytestmark = pytest.mark.skipif(bool(MISSING), reason="no native kernels")


@dataclass(frozen=True)
class Case:
    """A convolution of a (samples, ins, height, width) image."""

    form: str
    size: tuple[int, int, int, int]
    outs: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    low: int = 0
    high: int = 15

    def weights(self) -> Tensor:
        """Return integers (out, height, width, in / groups)."""
        shape = self.outs, self.kernel, self.kernel, self.size[1] // self.groups
        if self.form != "sparse":
            return torch.randint(-127, 128, shape, dtype=torch.int8)
        fours = torch.randint(-7, 8, (*shape[:3], shape[3] // 4, 4))
        return (fours * (torch.rand(fours.shape).argsort(-1) < 2)).reshape(shape).to(torch.int8)

    def image(self, offset: int = 0) -> Image:
        n, c, h, w = self.size
        return offset, n, h, w, c, self.padding, -self.low, c


CASES = [
    Case("sparse", (1, 16, 9, 7), 32, 3, padding=1),
    Case("sparse", (2, 20, 9, 7), 24, 3, 2, 1, low=-7, high=7),
    Case("sparse", (1, 8, 13, 5), 16),
    Case("sparse", (2, 32, 6, 6), 48, 3, padding=2, dilation=2),
    Case("sparse", (2, 64, 5, 6), 48, 3, padding=1, groups=2),
    Case("dense", (1, 3, 9, 7), 16, 7, 2, 3, low=-127, high=127),
    Case("dense", (2, 10, 5, 9), 24, 3, padding=1, high=255),
    Case("dense", (2, 12, 5, 9), 24, 3, padding=2, dilation=2, groups=3, high=255),
    Case("dense", (3, 64, 1, 1), 40, high=255),
    Case("depthwise", (2, 24, 7, 7), 24, 3, 2, 1, groups=24, low=-127, high=127),
    Case("depthwise", (1, 40, 9, 9), 40, 5, padding=4, dilation=2, groups=40, high=255),
]
TABLE = torch.randint(0, 16, (256,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
STEP, OUT_STEP = 0.37, 0.05
KINDS = [(None, False, True, True), (None, True, True, False), (TABLE, False, False, True), (TABLE, True, False, False)]
"""A table, pruning, a bias and a norm, or not."""


def bytes_of(image: Image) -> int:
    _, n, height, width, _, halo, _, stride = image
    return n * (height + 2 * halo) * (width + 2 * halo) * stride


def pruned(codes: Tensor) -> Tensor:
    """Keep the four largest of eight channels, by keys that order equal codes."""
    eights = codes.movedim(1, -1).unflatten(-1, (-1, 8))
    keys = 8 * eights + torch.arange(7, -1, -1)
    fourth = keys.sort(-1, descending=True).values[..., 3:4]
    return torch.where(keys >= fourth, eights, 0).flatten(-2).movedim(-1, 1)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.form}-{'x'.join(map(str, case.size))}-{case.outs}")
def test_a_layer_equals_exact_arithmetic(case: Case, isa: str) -> None:
    torch.manual_seed(0)
    weights, x = case.weights(), 3 * torch.randn(case.size)
    geometry = (case.stride, case.stride), (case.dilation, case.dilation)
    layer = kernels.integer_layer(weights, case.groups, *geometry, case.high - case.low)
    assert layer.form == case.form
    q = (x / STEP).round().clamp(case.low, case.high).double()
    taps = weights.permute(0, 3, 1, 2).double()
    sums = F.conv2d(q, taps, None, case.stride, case.padding, case.dilation, case.groups).float()
    steps, bias, gain, shift = (factor * torch.randn(case.outs) for factor in (0.01, 1, 1, 1))
    for table, prune, has_bias, has_norm in KINDS:
        b, g, s = bias if has_bias else None, gain if has_norm else None, shift if has_norm else None
        y = sums * steps.view(-1, 1, 1)
        y = y + bias.view(-1, 1, 1) if has_bias else y
        y = y * gain.view(-1, 1, 1) + shift.view(-1, 1, 1) if has_norm else y
        codes = (y / OUT_STEP).round().clamp(-3, 12).long() + 3
        wanted = codes if table is None else table[codes].long()
        wanted = pruned(wanted) if prune else wanted
        source, (samples, _, height, width) = case.image(), y.shape
        result = -(-bytes_of(source) // 64) * 64, samples, height, width, case.outs, 1, 3, case.outs
        program = kernels.IntegerProgram(result[0] + bytes_of(result))
        floats, found = torch.empty(y.shape), torch.empty(y.shape)
        zero, pads = -case.low, (case.padding, case.padding)
        program.encode(0, source, STEP, case.low, case.high)
        program.layer(layer, source, result, zero, pads, steps, b, g, s, OUT_STEP, -3, 12, table, prune)
        program.decode(result, 1, torch.arange(256.0))
        program.layer_to_floats(layer, source, 2, zero, pads, steps, b, g, s)
        for threads in (1, 3):
            slots = [one.data_ptr() for one in (x, found, floats)]
            assert program.run(0, 4, slots, isa, threads) == -1
            assert torch.equal(floats, y) and torch.equal(found.long(), wanted)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize(("form", "weight", "low", "high"), [
    ("sparse", 7, -8, 7), ("sparse", -7, -8, 7), ("sparse", 7, 0, 15),
    ("dense", 127, -127, 127), ("dense", -127, -128, 127), ("dense", -127, 0, 255),
])  # fmt: skip
def test_the_largest_sums_fit(form: str, weight: int, low: int, high: int, isa: str) -> None:
    depth = (1 << 16) - 8
    weights = torch.full((16, 1, 1, depth), weight, dtype=torch.int8)
    if form == "sparse":
        weights[..., 2::4] = weights[..., 3::4] = 0
    layer = kernels.integer_layer(weights, 1, (1, 1), (1, 1), high - low)
    assert layer.form == form
    x, y = torch.tensor([[high], [low]]).float().expand(2, depth).contiguous(), torch.empty(2, 16)
    program, source = kernels.IntegerProgram(2 * depth), (0, 2, 1, 1, depth, 0, -low, depth)
    program.encode(0, source, 1.0, low, high)
    program.layer_to_floats(layer, source, 1, -low, (0, 0), torch.ones(16), None, None, None)
    program.run(0, 2, [x.data_ptr(), y.data_ptr()], isa, 1)
    assert torch.equal(y, (x.double() @ weights.view(16, -1).double().t()).float())


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_order_of_eight_codes_is_pruned_right(isa: str) -> None:
    """All 3^8 blocks of three codes, which have every pattern of ties, and random ones."""
    few = torch.cartesian_prod(*[torch.tensor([0.0, 7.0, 15.0])] * 8)
    eights = torch.cat([few, torch.randint(0, 16, (2000, 8)).float()])
    for channels in (8, 24, 64, 72):
        x = eights.flatten()[: len(eights) * 8 // channels * channels].reshape(-1, channels)
        image = 0, len(x), 1, 1, channels, 0, 0, channels
        program = kernels.IntegerProgram(2 * x.numel())
        program.encode(0, image, 1.0, 0, 15)
        program.recode(image, (x.numel(), *image[1:]), None, True)
        program.decode((x.numel(), *image[1:]), 1, torch.arange(256.0))
        found = torch.empty_like(x)
        program.run(0, 3, [x.data_ptr(), found.data_ptr()], isa, 1)
        assert torch.equal(found, pruned(x.view(*x.shape, 1, 1).long()).view_as(x).float())


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_result_next_to_the_middle_of_two_codes_is_rounded_as_a_division_is(isa: str) -> None:
    """Sums and steps for which a product with the reciprocal of the step would round to another code."""
    step = torch.tensor(0.1)
    sums = torch.arange(-127, 128, dtype=torch.int8).view(-1, 1, 1, 1)
    scales = [(k + 0.5) * 0.1 / k for k in range(1, 120)]
    layer = kernels.integer_layer(sums, 1, (1, 1), (1, 1), 255)
    for scale in scales:
        image, x, found = (0, 1, 1, 1, 1, 0, 0, 1), torch.ones(1, 1), torch.empty(255)
        steps = torch.full((255,), scale)
        result = 64, 1, 1, 1, 255, 0, 0, 255
        program = kernels.IntegerProgram(512)
        program.encode(0, image, 1.0, 0, 255)
        program.layer(layer, image, result, 0, (0, 0), steps, None, None, None, float(step), -127, 127, None, False)
        program.decode(result, 1, torch.arange(256.0) - 127)
        program.run(0, 3, [x.data_ptr(), found.data_ptr()], isa, 1)
        assert torch.equal(found, (sums.flatten().float() * steps / step).round().clamp(-127, 127))


Factors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Steps, bias, gain and shift of a norm, `(out,)`."""


def codes_of_norms(
    case: Case, x: Tensor, factors: Factors, grid: tuple[float, int, int], isa: str
) -> tuple[Tensor, Tensor]:
    """Return the codes of a layer, and those of float32 operations one by one on exact sums."""
    torch.manual_seed(0)
    weights, (step, low, high) = case.weights(), grid
    layer = kernels.integer_layer(weights, case.groups, (1, 1), (1, 1), 15)
    source, (n, _, height, width) = case.image(), x.shape
    result = 64 * x.numel(), n, height, width, case.outs, 0, 0, case.outs
    program, found = kernels.IntegerProgram(result[0] + bytes_of(result)), torch.empty(n, case.outs, height, width)
    program.encode(0, source, 1.0, 0, 15)
    program.layer(layer, source, result, 0, (0, 0), *factors, step, low, high, None, False)
    program.decode(result, 1, torch.arange(256.0))
    program.run(0, 3, [x.data_ptr(), found.data_ptr()], isa, 1)
    sums = F.conv2d(x.double(), weights.permute(0, 3, 1, 2).double(), groups=case.groups).float()
    steps, bias, gain, shift = (factor.view(-1, 1, 1) for factor in factors)
    y = (sums * steps + bias) * gain + shift
    return found, (y / torch.tensor(step)).nan_to_num(low, high, low).round().clamp(low, high) - low


POINTWISE = [
    Case("sparse", (1, 8, 5, 5), 40),
    Case("dense", (1, 8, 5, 5), 40),
    Case("depthwise", (1, 40, 5, 5), 40, groups=40),
]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", POINTWISE, ids=lambda case: case.form)
@pytest.mark.parametrize("grid", [(0.37, 0, 15), (0.011, -127, 127), (3.0, 0, 255), (0.37, 3, 9)])
def test_every_norm_rounds_as_its_operations_do(case: Case, grid: tuple[float, int, int], isa: str) -> None:
    """Results a few roundings away from the middle of two codes, and sums, biases and shifts of any size."""
    step, low, high = grid
    for seed in range(6):
        torch.manual_seed(seed)
        x = torch.randint(0, 16, case.size).float()
        size = 10.0 ** torch.randint(-3, 1 + seed % 6, (2, case.outs))
        steps, gain = torch.rand(2, case.outs) * step * 10.0 ** torch.randint(-3, 2, (2, case.outs))
        bias = torch.randn(case.outs) * size[0]
        middle = torch.randint(low, high + 1, (case.outs,)) + 0.5
        # The pixel whose sum is zero, if there is one, lies next to the middle of two codes.
        shift = middle * step - bias * gain + size[1] * torch.randint(-3, 4, (case.outs,)) * 1e-7
        found, wanted = codes_of_norms(
            case, x * (torch.rand(x.shape[-2:]) < 0.8), (steps, bias, gain, shift), grid, isa
        )
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", POINTWISE, ids=lambda case: case.form)
def test_a_norm_that_is_no_number_gives_the_lowest_code(case: Case, isa: str) -> None:
    for size, bad in (1e30, 1.0), (1.0, torch.nan), (1.0, torch.inf), (1.0, -torch.inf):
        x, (steps, bias, gain, shift) = torch.randint(0, 16, case.size).float(), torch.randn(4, case.outs) * size
        bias[::3] = bad
        found, wanted = codes_of_norms(case, x, (steps, bias, gain, shift), (0.37, -3, 12), isa)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_sums_pools_slices_and_flattened_images(isa: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randint(0, 256, (2, 2, 12, 5, 7)).float()
    first, second = (0, 2, 5, 7, 12, 0, 0, 12), (1024, 2, 5, 7, 12, 1, 0, 12)
    joined = 4096, 2, 5, 7, 24, 1, 9, 24
    left, right = (*joined[:4], 12, *joined[5:]), (joined[0] + 12, *joined[1:4], 12, *joined[5:])
    total, small, flat = (8192, 2, 5, 7, 12, 0, 0, 12), (9216, 2, 3, 4, 12, 0, 0, 12), (9728, 2, 1, 1, 420, 0, 0, 420)
    program = kernels.IntegerProgram(11000)
    program.encode(0, first, 1.0, 0, 255)
    program.encode(1, second, 1.0, 0, 255)
    program.add(first, second, total, -100, 20, 250)
    program.recode(first, left, None, False)
    program.recode(second, right, TABLE, False)
    program.max_pool(second, small, (3, 3), (2, 2), (1, 1), (1, 1))
    program.flatten(second, flat, None, False)
    found = [torch.empty(2, 12, 5, 7), torch.empty(2, 24, 5, 7), torch.empty(2, 12, 3, 4), torch.empty(2, 420)]
    for slot, image in enumerate((total, joined, small, flat), 2):
        program.decode(image, slot, torch.arange(256.0))
    assert program.run(0, 11, [one.data_ptr() for one in (x, y, *found)], isa, 2) == -1
    assert torch.equal(found[0], (x + y - 100).clamp(20, 250))
    assert torch.equal(found[1], torch.cat([x, TABLE[y.long()].float()], 1))
    assert torch.equal(found[2], F.max_pool2d(y, 3, 2, 1)) and torch.equal(found[3], y.flatten(1))


def test_a_step_that_reads_a_nan_is_named() -> None:
    image, program = (0, 1, 2, 2, 1, 0, 0, 1), kernels.IntegerProgram(64)
    program.encode(0, image, 1.0, 0, 15)
    program.encode(1, image, 1.0, 0, 15)
    good, bad = torch.tensor([1.0, torch.inf, -torch.inf, 0.0]), torch.tensor([1.0, 2.0, torch.nan, 0.0])
    assert program.run(0, 2, [good.data_ptr(), good.data_ptr()], INSTRUCTION_SETS[0], 1) == -1
    assert program.run(0, 2, [good.data_ptr(), bad.data_ptr()], INSTRUCTION_SETS[0], 1) == 1


def test_operands_that_do_not_fit_are_refused() -> None:
    case = CASES[0]
    layer = kernels.integer_layer(case.weights(), 1, (1, 1), (1, 1), 15)
    program = kernels.IntegerProgram(8192)

    def add(
        source: Image = (0, 1, 9, 7, 16, 1, 0, 16),
        result: Image = (4096, 1, 9, 7, 32, 0, 0, 32),
        padding: int = 1,
        steps: int = 32,
        high: int = 15,
        table: Tensor | None = None,
        prune: bool = False,
    ) -> None:
        factors, pads = (torch.ones(steps), None, None, None), (padding, padding)
        program.layer(layer, source, result, 0, pads, *factors, OUT_STEP, 0, high, table, prune)

    add()
    wrong: dict[str, Callable[[], None]] = {
        "arena": lambda: add(result=(8000, 1, 9, 7, 32, 0, 0, 32)),
        "another size": lambda: add(result=(4096, 1, 8, 7, 32, 0, 0, 32)),
        "channels": lambda: add(source=(0, 1, 9, 7, 12, 1, 0, 12)),
        "halo": lambda: add(padding=2),
        "each out-channel": lambda: add(steps=31),
        "bytes": lambda: add(high=256),
        "four bits": lambda: add(high=255, prune=True),
        "256 codes": lambda: add(table=TABLE[:255]),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="too large"):
        kernels.integer_layer(torch.zeros(1, 1, 1, 1 << 16, dtype=torch.int8), 1, (1, 1), (1, 1), 15)
    with pytest.raises(ValueError, match="groups"):
        kernels.integer_layer(replace(case, outs=31).weights(), 2, (1, 1), (1, 1), 15)
    with pytest.raises(ValueError, match="no such steps"):
        program.run(0, 2, [], INSTRUCTION_SETS[0], 1)
    program.decode((4096, 1, 9, 7, 32, 0, 0, 32), 2, torch.arange(256.0))
    with pytest.raises(ValueError, match="more slots"):
        program.run(0, 2, [0, 0], INSTRUCTION_SETS[0], 1)
