"""Grids, fake quantization, SAWB and PACT against brute force and closed forms."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from nmcompile.errors import ConfigError, OperandError
from nmcompile.quantization import (
    Grid,
    fake_quantize,
    integers,
    pact_quantize,
    positive_clip,
    sawb_quantize,
    sawb_scale,
)

GRIDS = [Grid(bits, signed) for bits, signed in itertools.product((2, 3, 4, 8), (False, True))]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def nearest(x: Tensor, step: float, grid: Grid) -> Tensor:
    """Find the nearest grid point by trying all of them, in float64."""
    points = torch.arange(grid.low, grid.high + 1, dtype=torch.float64) * step
    return points[(x.double().unsqueeze(-1) - points).abs().argmin(-1)]


def test_ranges() -> None:
    assert (Grid(4, True).low, Grid(4, True).high) == (-7, 7)
    assert (Grid(4, False).low, Grid(4, False).high) == (0, 15)
    assert str(Grid(4, True)) == "s4" and str(Grid(8, False)) == "u8"
    with pytest.raises(ConfigError, match="bits of a grid is 1"):
        Grid(1, True)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_nearest_point_is_taken(grid: Grid) -> None:
    x = torch.randn(4, 257, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(fake_quantize(x, 0.21, grid), nearest(x, 0.21, grid))


def test_ties_go_to_even_integers() -> None:
    halves = torch.arange(-3.5, 4.0, 1.0)
    assert integers(halves, 1.0, Grid(4, True)).tolist() == [-4, -2, -2, -0.0, 0, 2, 2, 4]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.sampled_from(GRIDS),
    st.sampled_from(DTYPES),
    st.floats(0.01, 10),
    st.integers(0, 2**31),
)
def test_invariants(shape: tuple[int, ...], grid: Grid, dtype: torch.dtype, step: float, seed: int) -> None:
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    y = fake_quantize(x, step, grid)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert torch.equal(fake_quantize(y, step, grid), y)
    assert (y[x == 0] == 0).all()
    flipped = fake_quantize(-x, step, grid)
    assert not grid.signed or torch.equal(flipped, -y)
    order = x.flatten().argsort()
    assert (y.flatten()[order].diff() >= 0).all()
    assert (y.double().abs() <= grid.high * step * 1.01).all()


def test_special_values() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    y = fake_quantize(x, 0.5, Grid(4, True))
    assert y[0].isnan() and y[1:].tolist() == [3.5, -3.5, 0.0, 0.0]


def test_steps_per_channel_and_strides() -> None:
    x = torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last)
    steps = torch.tensor([0.1, 0.2, 0.4, 0.8]).view(1, 4, 1, 1)
    y = fake_quantize(x, steps, Grid(4, True))
    assert y.stride() == x.stride()
    for channel in range(4):
        assert torch.equal(y[:, channel], fake_quantize(x[:, channel], float(steps[0, channel]), Grid(4, True)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_gradient_passes_inside_the_grid(grid: Grid) -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    fake_quantize(x, 0.3, grid).sum().backward()
    inside = (x >= grid.low * 0.3) & (x <= grid.high * 0.3)
    assert x.grad is not None and torch.equal(x.grad, inside.double())


def test_it_compiles_and_exports_to_plain_operators() -> None:
    class Quantize(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fake_quantize(x, 0.25, Grid(4, False))

    x = torch.randn(4, 4)
    run = torch.compile(Quantize(), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(x), Quantize()(x))
    program = torch.export.export(Quantize(), (x,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(target.startswith("aten.") for target in targets)


# SAWB


DRAWN = {
    "gaussian": torch.distributions.Normal(0.0, 1.0),
    "laplace": torch.distributions.Laplace(0.0, 1.0),
    "logistic": torch.distributions.TransformedDistribution(
        torch.distributions.Uniform(0.0, 1.0), [torch.distributions.SigmoidTransform().inv]
    ),
}


def error(w: Tensor, step: float, grid: Grid) -> float:
    return float((fake_quantize(w, step, grid) - w).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("law", DRAWN)
def test_sawb_is_close_to_the_best_clip(law: str, bits: int) -> None:
    """Its error is within 15 % of that of the best step that a scan finds; max|w| is several times worse at 4 bits."""
    torch.manual_seed(0)
    w, grid = DRAWN[law].sample((20_000,)), Grid(bits, True)
    found = error(w, float(sawb_scale(w, bits)), grid)
    best = min(error(w, float(w.abs().max()) * share / 200 / grid.high, grid) for share in range(1, 201))
    assert found <= 1.15 * best
    assert bits != 4 or error(w, float(w.abs().max()) / grid.high, grid) > 2 * best


LAWS = {
    "normal": stats.norm(),
    "laplace": stats.laplace(),
    "logistic": stats.logistic(),
    "uniform": stats.uniform(-1, 2),
    "triangular": stats.triang(0.5, -1, 2),
    "von Mises": stats.vonmises(1.0),
}


@pytest.mark.parametrize("law", LAWS)
def test_three_bits_are_fitted_to_seven_levels(law: str) -> None:
    """The published pair, for eight levels, is more than 2 % off on three of the laws."""
    w, grid = torch.from_numpy(LAWS[law].rvs(50_000, random_state=0)), Grid(3, True)
    best = min(error(w, float(w.abs().mean()) * share / 100 / grid.high, grid) for share in range(150, 400, 4))
    assert error(w, float(sawb_scale(w, 3)), grid) <= 1.01 * best


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sawb_is_its_formula(bits: int) -> None:
    c1, c2 = {2: (2.6, 1.71), 3: (6.943, 6.304), 4: (12.035, 12.03), 8: (31.76, 35.04)}[bits]
    w = torch.randn(64, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alpha = c1 * w.square().mean().sqrt() - c2 * w.abs().mean()
    assert w.abs().mean() < alpha < w.abs().max()
    torch.testing.assert_close(sawb_scale(w, bits), alpha / (2 ** (bits - 1) - 1))


@pytest.mark.parametrize("w", [torch.full((8,), -2.0), torch.tensor([0.0] * 63 + [5.0]), torch.tensor([1.0, -1.0])])
def test_other_shapes_than_bells_fall_back_to_the_largest(w: Tensor) -> None:
    assert float(sawb_scale(w, 4)) == pytest.approx(float(w.abs().max()) / 7)


def test_weights_that_are_not_finite_stay_so() -> None:
    assert sawb_scale(torch.tensor([1.0, torch.nan]), 4).isnan()
    for bad in (torch.nan, torch.inf):
        assert not sawb_quantize(torch.tensor([1.0, 2.0, bad]), 4).isfinite().all()


@pytest.mark.parametrize("smallest", [0.0, 1e-45])
def test_weights_without_magnitude_have_a_positive_step(smallest: float) -> None:
    assert sawb_scale(torch.full((4, 4), smallest), 4) > 0


def test_zero_channels_have_a_positive_step() -> None:
    assert (sawb_scale(torch.zeros(4, 4), 4, dim=0) > 0).all()


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_one_step_for_each_channel(dim: int) -> None:
    w = torch.randn(6, 5, 3)
    steps = sawb_scale(w, 4, dim=dim)
    assert steps.dim() == 3 and steps.shape[dim] == w.shape[dim] and steps.numel() == w.shape[dim]
    for index in range(w.shape[dim]):
        torch.testing.assert_close(steps.select(dim, index).flatten()[0], sawb_scale(w.select(dim, index), 4))


def test_sawb_quantize_takes_the_step_of_the_dense_weight() -> None:
    w = torch.randn(16, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    y = sawb_quantize(w, 4, mask=mask)
    assert torch.equal(y.detach(), fake_quantize((w * mask).detach(), sawb_scale(w.detach(), 4), Grid(4, True)))
    y.sum().backward()
    assert w.grad is not None and torch.equal(w.grad, mask.float())


def test_sawb_errors() -> None:
    with pytest.raises(ConfigError, match="5 bits"):
        sawb_scale(torch.ones(4), 5)
    with pytest.raises(OperandError, match=r"\(2, 2\)"):
        sawb_quantize(torch.ones(4), 4, mask=torch.ones(2, 2, dtype=torch.bool))


# PACT


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pact_clips_and_rounds(bits: int) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    clip = torch.tensor(1.5, dtype=torch.float64)
    torch.testing.assert_close(pact_quantize(x, clip, bits), nearest(x, 1.5 / (2**bits - 1), Grid(bits, False)))


def test_pact_gradients() -> None:
    """The gradients are those of clamp(x, 0, clip): rounding passes gradients straight through."""
    x = torch.randn(500, generator=torch.Generator().manual_seed(5), dtype=torch.float64, requires_grad=True)
    clip = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(500, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    ours = torch.autograd.grad(pact_quantize(x, clip, 4), [x, clip], weight)
    clamped = torch.where(x < clip, x.relu(), clip)
    expected = torch.autograd.grad(clamped, [x, clip], weight)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("clip", [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-30])
@pytest.mark.parametrize("bits", [2, 8])
def test_a_clip_at_zero_clips_everything_and_can_be_lifted(clip: float, bits: int) -> None:
    x = torch.tensor([-1.0, 0.0, 1e-3, 3.0], requires_grad=True)
    learned = torch.tensor(clip, requires_grad=True)
    y = pact_quantize(x, learned, bits)
    assert (y[:2] == 0).all() and (y[2:] > 0).all() and (y < 1e-28).all()
    y.sum().backward()
    assert learned.grad == (-2 if clip < 0 else 2)
    assert x.grad is not None and x.grad.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_positive_clip_is_taken_as_it_is(dtype: torch.dtype) -> None:
    clip = torch.tensor([0.3, -6.0], dtype=dtype)
    assert torch.equal(positive_clip(clip), clip.abs().to(torch.promote_types(dtype, torch.float32)))
    assert positive_clip(torch.tensor(torch.nan)).isnan()


def test_clip_gradients_of_half_precision_do_not_overflow() -> None:
    x, clip = torch.ones(100_000, dtype=torch.float16), torch.tensor(0.5, requires_grad=True)
    pact_quantize(x, clip, 4).backward(torch.ones_like(x))
    assert clip.grad is not None and clip.grad == 100_000


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 4, 2), (5, 4, 1)])
@pytest.mark.parametrize("quantize", [fake_quantize, integers])
def test_a_scale_that_does_not_broadcast_is_refused(quantize: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    with pytest.raises(OperandError, match=r"the scale has shape .*, x \(4, 2\)"):
        quantize(torch.ones(4, 2), torch.ones(shape), Grid(4, True))


def test_a_clip_of_several_numbers_is_refused() -> None:
    with pytest.raises(OperandError, match=r"the clip has shape \(2,\)"):
        pact_quantize(torch.ones(4, 2), torch.ones(2), 4)


def test_a_weight_without_elements_has_no_step() -> None:
    with pytest.raises(OperandError, match=r"shape \(0, 4\) has no elements"):
        sawb_scale(torch.ones(0, 4), 4)
