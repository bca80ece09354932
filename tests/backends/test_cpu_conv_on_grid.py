"""Convolutions of an inference graph that sum integers: chosen, reported, and never stale."""

import copy
import gc
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, Phase, presets, weight_cache
from nmcompile.backends.cpu import packed_integers
from nmcompile.backends.cpu.conv import conv_forward
from nmcompile.backends.cpu.conv_on_grid import conv_forward_on_grid
from nmcompile.backends.cpu.convolved_integers import ConvGridWeight
from nmcompile.backends.cpu.gemm import Geometry
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.packed_integers import GridInput
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.custom_op import operator_of
from nmcompile.ir.choice import Choice
from nmcompile.ir.operations import to_grid
from nmcompile.native import kernels
from nmcompile.quantization import Grid, sawb_scale
from nmcompile.three_gemm import grid_steps
from nmcompile.training import clips
from nmcompile.training.find_masks import masks_of
from nmcompile.weight_cache import WeightCache, weights_at_rest
from tests.backends.grid_convolutions import Convolutions, Images, Signals, kernels_of, model

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)


@pytest.fixture(autouse=True)
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Force every GEMM to the kernel that has a choice; return a list with an entry for each packed weight."""
    calls: list[int] = []
    pack = kernels.integer_layer

    def counted(weights: Tensor, *rest: Any) -> object:
        calls.append(1)
        return pack(weights, *rest)

    monkeypatch.setattr(kernels, "integer_layer", counted)
    monkeypatch.setattr(packed_integers, "_kept", WeightCache())
    chosen("sparse", monkeypatch)
    return calls


def chosen(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice(kernel, "the test asks for it"))


@pytest.mark.parametrize(("granularity", "mode"), [("tensor", torch.no_grad), ("channel", torch.inference_mode)])
@pytest.mark.parametrize("kind", [Images, Signals])
def test_an_inference_graph_sums_integers(
    kind: type[Convolutions], granularity: str, mode: type, packed: list[int]
) -> None:
    (compiled, x), (expected, _) = (model(kind, name, granularity=granularity) for name in ("cpu", "reference"))
    packed.clear()
    with mode():
        for y in (x, x, x.transpose(0, 1).contiguous().transpose(0, 1), 3 * x[:1]):
            found, wanted = compiled(y), expected(y)
            torch.testing.assert_close(found, wanted)
            assert found.stride() == wanted.stride()
    layers = len(kernels_of(compiled))
    assert kernels_of(compiled) == ["integers"] * layers and len(packed) == layers
    assert compiled.state_dict().keys() == expected.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("of", ["input", "weight"])
def test_channels_last_stays_so(of: str) -> None:
    (compiled, x), (reference, _) = model(), model(backend="reference")
    expected = compiled(x)
    if of == "input":
        x = x.to(memory_format=torch.channels_last)
    else:
        for net in (compiled, reference):
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for kernel in ("sparse", "dense"):
        found = compiled(x)
        assert found.is_contiguous(memory_format=torch.channels_last) and found.stride() == reference(x).stride()
        assert kernel == "dense" or torch.equal(found, expected)
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_inputs_of_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    (compiled, x), (expected, _) = model(Signals), model(Signals, "reference")
    torch.testing.assert_close(compiled(x[0]), expected(x[0]))
    assert kernels_of(compiled) == ["integers"] * 2
    monkeypatch.undo()
    compiled, x = model()
    assert compiled(x[:0]).shape == (0, 12, 3, 7)
    with pytest.raises(RuntimeError, match="channels"):
        compiled(torch.randn(2, 12, 7, 9))
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size|[Nn]egative|larger|greater"):
        compiled(torch.randn(2, 8, 2, 1))


def test_with_gradients_nothing_is_kept(packed: list[int]) -> None:
    (compiled, x), (reference, _) = model(), model(backend="reference")
    packed.clear()
    packed_integers._kept.clear()
    x = x.requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, reference(x))
    y.sum().backward()
    assert not packed and len(packed_integers._kept) == 0 and x.grad is not None


def write_in_place(net: Convolutions) -> None:
    net.first.weight.mul_(2)


def write_through_data(net: Convolutions) -> None:
    net.first.weight.data.copy_(net.first.weight.flip(0))


def move_the_mask(net: Convolutions) -> None:
    (mask,) = masks_of(net.first).values()
    mask.tensor.copy_(mask.tensor.roll(4, 1))


def write_the_clip(net: Convolutions) -> None:
    for clip in clips(net):
        clip.mul_(0.5)


def write_the_bias(net: Convolutions) -> None:
    assert net.first.bias is not None
    net.first.bias.add_(1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kernel", "write"),
    [
        ("sparse", write_in_place),
        ("dense", write_through_data),
        ("sparse", move_the_mask),
        ("dense", move_the_mask),
        ("sparse", write_the_clip),
        ("sparse", write_the_bias),
    ],
)
def test_nothing_stale_is_read(
    kernel: str, write: Callable[[Convolutions], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(kernel, monkeypatch)
    nets = [model(clip="pact"), model(backend="reference", clip="pact")]
    (compiled, x), (reference, _) = nets
    before = compiled(x)
    for net, _ in nets:
        write(net)
    torch.testing.assert_close(compiled(x), reference(x))
    assert not torch.allclose(before, compiled(x))


@torch.no_grad()
def test_forms_live_as_long_as_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, x = model()
    for kernel in ("dense", "sparse"):
        chosen(kernel, monkeypatch)
        compiled(x)
        kept = [weight_cache._cached[weight][packed_integers._kept].value for weight in packed_integers._kept.weights()]
        assert len(kept) == 3 and all((form.values is None) == (kernel == "sparse") for form in kept)
    assert all(form.packed for form in kept)
    for replica in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(replica(x), compiled(x))
    del compiled, replica, kept
    gc.collect()
    assert len(packed_integers._kept) == 0


@torch.no_grad()
def test_what_has_no_integers_of_four_bits_runs_on_values(packed: list[int]) -> None:
    compiled, x = model(bits=8)
    torch.testing.assert_close(compiled(x), model(backend="reference", bits=8)[0](x))
    assert not packed and "integers" not in kernels_of(compiled)


@torch.no_grad()
def test_a_nan_in_a_weight_stays_one() -> None:
    (compiled, x), (reference, _) = model(), model(backend="reference")
    for net in (compiled, reference):
        net.last.weight[1, 2, 0, 0] = torch.nan
    torch.testing.assert_close(compiled(x), reference(x), equal_nan=True)
    assert compiled(x)[:, 1].isnan().all() and kernels_of(compiled) == ["integers", "integers", "dense"]


@torch.no_grad()
def test_a_nan_in_the_input_stays_one() -> None:
    (compiled, x), (reference, _) = model(), model(backend="reference")
    x[1, 2, 3, 4] = torch.nan
    torch.testing.assert_close(compiled(x), reference(x), equal_nan=True)
    assert compiled(x).isnan().any() and kernels_of(compiled)[0] == "dense"


GEOMETRY = Geometry((2, 1), (1, 0), (1, 2), 2)


def on_grids(signed: bool = True) -> tuple[ConvGridWeight, GridInput]:
    torch.manual_seed(0)
    weight, mask, step = torch.randn(12, 8, 3, 2), torch.zeros(12, 8, 3, 2, dtype=torch.bool), torch.tensor(0.31)
    mask[:, ::2] = True
    values = to_grid(2 * torch.randn(2, 16, 7, 9), step, 4, signed)
    return ConvGridWeight(weight, mask, torch.tensor(0.2), 4, GEOMETRY), GridInput(values, step, Grid(4, signed))


@torch.no_grad()
@pytest.mark.parametrize("signed", [False, True])
def test_an_input_that_an_observer_left_off_its_grid_is_not_rounded(signed: bool) -> None:
    weight, x = on_grids(signed)
    output = torch.empty(2, 12, 4, 7)
    for values in (x.values + 0.1, x.values * 100, x.values.double().mul(1.001).float()):
        arguments = values, weight.weight, weight.mask, weight.step, x.step, None, 4, 4, signed, *GEOMETRY, "a"
        assert not weight.convolve(x._replace(values=values), None, output)
        with weights_at_rest():
            found = conv_forward_on_grid(*arguments)
        torch.testing.assert_close(found, conv_forward(values, weight.values(), None, None, *GEOMETRY, "b"))
    for step in (0.0, torch.nan, torch.inf):
        assert not weight.convolve(x._replace(step=torch.tensor(step)), None, output)


@torch.no_grad()
def test_any_mask_has_integers_but_too_large_depths_have_none() -> None:
    weight, x = on_grids()
    dense = ConvGridWeight(weight.weight, torch.ones_like(weight.mask), weight.step, 4, GEOMETRY)
    found, bias = torch.empty(2, 12, 4, 7), torch.randn(12)
    assert dense.convolve(x, bias, found)
    torch.testing.assert_close(found, conv_forward(x.values, dense.values(), None, bias, *GEOMETRY, "a"))
    long = torch.zeros(4, 4, 1, 1 << 14)
    assert ConvGridWeight(long, long == 0, weight.step, 4, Geometry((1, 1), (0, 0), (1, 1))).packed() is None


@torch.no_grad()
def test_the_report_has_all_times(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, x = model()
    times = Choice("sparse", "measured", None, 4e-3, 1e-3)
    monkeypatch.setattr(choices, "_choice", lambda problem, *_: times)
    compiled(x)
    report = nmcompile.inspect(compiled).full()
    assert "integers: 4.00 / 1.00 ms = 4.00" in report and "3 of 3 GEMMs that ran had a sparse kernel" in report
    slower = Choice("dense", "measured", None, 4e-3, 5e-3)
    monkeypatch.setattr(choices, "_choice", lambda problem, *_: slower if "grid" in problem()[0] else times)
    compiled(x)
    assert "sparse: 4.00 / 1.00 ms = 4.00; packed integers 5.00 ms" in nmcompile.inspect(compiled).full()


@torch.no_grad()
def test_the_smallest_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    compiled, x = model()
    compiled(x)
    for layer in nmcompile.inspect(compiled).layers:
        choice = layer.choices[Phase.FORWARD]
        assert choice.integers_seconds is not None
        assert choice.kernel == "integers" or choice.reason.startswith("small")


@torch.no_grad()
def test_padding_that_is_far_larger_than_the_image_takes_no_memory() -> None:
    net, x = nn.Sequential(nn.Conv2d(8, 8, 3, stride=30_000, padding=30_000)).eval(), torch.randn(1, 8, 9, 9)
    config = CompileConfig(layers={"_default": presets["inference"]}, ends="sparse")
    found, expected = (
        nmcompile.compile(net, "inference", args=(x,), config=config, calibration=[x], backend=backend).eval()
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(found(x), expected(x))
    assert kernels_of(found) != ["integers"]
    nmcompile.freeze(found)
    torch.testing.assert_close(found(x), expected(x))


@torch.no_grad()
def test_an_absorbed_norm_refuses_the_images_that_its_module_refuses() -> None:
    compiled, x = model()
    with pytest.raises(ValueError, match="expected 4D input"):
        compiled(x[0])


def test_verify_looks_at_what_is_multiplied() -> None:
    compiled, x = model()
    report = nmcompile.verify(compiled, step=lambda: compiled(x).sum().backward())
    assert report.ok and "last (forward)" in str(report)


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("dims", [1, 2])
def test_fakes_and_schemas(dims: int, is_last: bool) -> None:
    checks = "test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"
    weight, x = on_grids()
    values, w, mask, geometry = x.values, weight.weight, weight.mask, GEOMETRY
    if dims == 1:
        values, w, mask = values[..., 0].contiguous(), w[..., 0].contiguous(), mask[..., 0].contiguous()
        geometry = Geometry((2,), (1,), (1,), 2)
    elif is_last:
        values = values.to(memory_format=torch.channels_last)
    step = torch.rand(12, *(1,) * (dims + 1)) if is_last else weight.step
    lists = (*map(list, geometry[:3]), 2)
    arguments = values, w, mask, step, x.step, torch.randn(12), 4, 4, True, *lists, "a"
    for resting in (nullcontext(), weights_at_rest()):
        with resting:
            torch.library.opcheck(operator_of(conv_forward_on_grid), arguments, test_utils=checks)


@torch.no_grad()
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_norm_reads_a_weight_at_rest_for_its_step_once(is_frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, x = model()
    if is_frozen:
        nmcompile.freeze(compiled)
    before = compiled(x)
    found: list[int] = []

    def counted(weight: Tensor, bits: int, dim: int | None = None) -> Tensor:
        found.append(1)
        return sawb_scale(weight, bits, dim=dim)

    monkeypatch.setattr(grid_steps, "sawb_scale", counted)
    assert torch.equal(compiled(x), before) and not found
    compiled.first.weight.mul_(3)
    compiled.load_state_dict(compiled.state_dict())
    after = compiled(x)
    assert found and not torch.allclose(after, before)
    assert torch.equal(after, copy.deepcopy(compiled)(x))
