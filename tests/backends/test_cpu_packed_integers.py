"""Linear layers of an inference graph that run from packed integers: chosen, reported, and never stale."""

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig, Phase, weight_cache
from nmcompile.backends.cpu import packed_integers
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.linear_on_grid import linear_forward_on_grid
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.backends.shared.known_choices import forget
from nmcompile.custom_op import operator_of
from nmcompile.ir.choice import Choice
from nmcompile.ir.operations import to_grid
from nmcompile.native import kernels
from nmcompile.training.find_masks import masks_of
from nmcompile.weight_cache import WeightCache, weights_at_rest

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)


@pytest.fixture(autouse=True)
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Force every GEMM to the kernel that has a choice; return a list with an entry for each packed weight."""
    calls: list[int] = []
    pack = kernels.pack_integers

    def counted(matrix: Tensor, threads: int) -> object:
        calls.append(1)
        return pack(matrix, threads)

    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    monkeypatch.setattr(kernels, "pack_integers", counted)
    monkeypatch.setattr(packed_integers, "_kept", WeightCache())
    return calls


def chosen(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice(kernel, "the test asks for it"))


def model(granularity: str = "tensor", backend: str = "cpu", bits: int = 4) -> tuple[nn.Sequential, Tensor]:
    """Return two layers: the first has a signed input, the second one that is not negative."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 12, bias=False)), torch.randn(5, 24)
    every = LayerConfig(nmcompile.presets["inference"].weight, weight_bits=bits, input_bits=4)
    config = CompileConfig(layers={"_default": every}, ends="sparse", granularity=granularity)
    compiled = nmcompile.compile(net, "inference", args=(x,), config=config, calibration=[x], backend=backend)
    assert isinstance(compiled, nn.Sequential)
    return compiled.eval(), x


def kernels_of(compiled: nn.Module) -> list[str]:
    return [layer.choices[Phase.FORWARD].kernel for layer in nmcompile.inspect(compiled).layers]


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_an_inference_graph_runs_from_integers(granularity: str, packed: list[int]) -> None:
    compiled, x = model(granularity)
    expected = model(granularity, "reference")[0]
    packed.clear()
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected(x))
    assert kernels_of(compiled) == ["integers", "integers"] and len(packed) == 2
    assert compiled.state_dict().keys() == expected.state_dict().keys()


def test_inference_mode_keeps_them_too(packed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    (compiled, x), (reference, _) = model(), model(backend="reference")
    monkeypatch.setattr(packed_integers, "_kept", WeightCache())
    packed.clear()
    with torch.inference_mode():
        expected = reference(x)
        for kernel in ("sparse", "dense", "sparse"):
            chosen(kernel, monkeypatch)
            torch.testing.assert_close(compiled(x), expected)
    assert len(packed) == 2


@torch.inference_mode()
def test_weights_without_a_version_are_kept_until_they_change() -> None:
    compiled, x = model()
    torch.testing.assert_close(compiled(x), model(backend="reference")[0](x))
    assert len(packed_integers._kept) == 2
    expected, _ = model(backend="reference")
    for net in (compiled, expected):
        net[0].weight.mul_(2)  # type: ignore[operator]
    torch.testing.assert_close(compiled(x), expected(x))


def test_with_gradients_nothing_is_kept(packed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, x = model()
    monkeypatch.setattr(packed_integers, "_kept", WeightCache())
    packed.clear()
    x = x.requires_grad_()
    torch.testing.assert_close(compiled(x), model(backend="reference")[0](x))
    compiled(x).sum().backward()
    assert not packed and len(packed_integers._kept) == 0 and x.grad is not None


def write_in_place(layer: nn.Linear) -> None:
    layer.weight.mul_(2)


def write_through_data(layer: nn.Linear) -> None:
    layer.weight.data.copy_(layer.weight.flip(0))


def put_another_in_place(layer: nn.Linear) -> None:
    layer.weight.data = torch.randn(20, 24, generator=torch.Generator().manual_seed(3))


def move_the_mask(layer: nn.Linear) -> None:
    (mask,) = masks_of(layer).values()
    mask.tensor.copy_(mask.tensor.roll(4, 1))


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("write", [write_in_place, write_through_data, put_another_in_place, move_the_mask])
def test_a_written_weight_is_read_anew(
    write: Callable[[nn.Module], None], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(kernel, monkeypatch)
    compiled, x = model()
    reference = model(backend="reference")[0]
    compiled(x)
    write(compiled[0])
    write(reference[0])
    torch.testing.assert_close(compiled(x), reference(x))


@torch.no_grad()
def test_values_are_kept_only_where_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, x = model()
    chosen("dense", monkeypatch)
    compiled(x)
    forms = [weight_cache._cached[layer.weight][packed_integers._kept].value for layer in (compiled[0], compiled[2])]
    assert all(form.values is not None for form in forms)
    chosen("sparse", monkeypatch)
    compiled(x)
    assert all(form.values is None and form.packed for form in forms)
    copy.deepcopy(compiled)(x)
    del compiled, forms
    gc.collect()
    assert len(packed_integers._kept) == 0


class CrossAttention(nn.Module):
    """A module that projects the queries by one part of a weight, and keys and values by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = x.flip(1)
        result: Tensor = self.attention(x, memory, memory)[0]
        return result


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parts_of_a_weight_are_not_packed_anew_in_each_call(mode: type, packed: list[int]) -> None:
    torch.manual_seed(0)
    net, x = CrossAttention(), torch.randn(2, 3, 16)
    config = CompileConfig(layers={"_default": nmcompile.presets["inference"]}, ends="sparse")
    compiled, expected = (
        nmcompile.compile(net, "inference", args=(x,), config=config, calibration=[x], backend=name).eval()
        for name in ("cpu", "reference")
    )
    packed.clear()
    with mode():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), expected(x))
    assert len(packed) <= 1  # of the output projection


@torch.no_grad()
def test_what_eight_bits_hold_is_not_packed(packed: list[int]) -> None:
    compiled, x = model(bits=8)
    torch.testing.assert_close(compiled(x), model(backend="reference", bits=8)[0](x))
    assert not packed and kernels_of(compiled) == ["sparse", "sparse"]


@torch.no_grad()
def test_a_nan_stays_one() -> None:
    compiled, x = model()
    weight = compiled[2].weight
    assert isinstance(weight, Tensor)
    weight[1, 2] = torch.nan
    assert compiled(x)[:, 1].isnan().all() and kernels_of(compiled) == ["integers", "dense"]


@torch.no_grad()
def test_the_report_has_all_times(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, x = model()
    times = Choice("sparse", "measured", None, 4e-3, 1e-3)
    monkeypatch.setattr(choices, "_choice", lambda problem, *_: times)
    compiled(x)
    report = nmcompile.inspect(compiled).full()
    assert "integers: 4.00 / 1.00 ms = 4.00" in report and "2 of 2 GEMMs that ran had a sparse kernel" in report
    slower = Choice("dense", "measured", None, 4e-3, 5e-3)
    monkeypatch.setattr(choices, "_choice", lambda problem, *_: slower if "grid" in problem()[0] else times)
    compiled(x)
    assert "sparse: 4.00 / 1.00 ms = 4.00; packed integers 5.00 ms" in nmcompile.inspect(compiled).full()


@torch.no_grad()
def test_a_large_weight_is_measured_with_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    forget()
    net, x = nn.Linear(1024, 1024), torch.randn(1, 1024)
    compiled = nmcompile.compile(net, "inference", args=(x,), config=CompileConfig(ends="sparse"), calibration=[x])
    compiled.eval()(x)
    choice = nmcompile.inspect(compiled).layers[0].choices[Phase.FORWARD]
    assert choice.integers_seconds is not None
    if choice.kernel == "integers":
        assert choice.reason == "measured" and choice.dense_seconds is not None and choice.speedup is not None


def test_verify_looks_at_what_is_multiplied() -> None:
    compiled, x = model()
    report = nmcompile.verify(compiled, step=lambda: compiled(x).sum().backward())
    assert report.ok and "0 (forward)" in str(report)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_fakes_and_schemas(granularity: str, transposed: bool) -> None:
    checks = "test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"
    weight, x, bias = torch.randn(12, 8), torch.randn(3, 5, 8), torch.randn(12)
    mask = torch.arange(12)[:, None].add(torch.arange(8)) % 4 < 2
    step = torch.rand(12, 1) if granularity == "channel" else torch.tensor(0.2)
    if transposed:
        weight, mask, step = weight.t().contiguous(), mask.t().contiguous(), step.t() if step.dim() else step
    x, input_step = to_grid(x, torch.tensor(0.3), 4, True), torch.tensor(0.3)
    arguments = x, weight, mask, step, input_step, bias, 4, 4, True, transposed, "a"
    for resting in (nullcontext(), weights_at_rest()):
        with resting:
            torch.library.opcheck(operator_of(linear_forward_on_grid), arguments, test_utils=checks)
