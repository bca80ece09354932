"""Weights that stay packed while no gradients are needed: the same results, and no stale ones."""

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.cpu import packed_weights
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.ir.choice import Choice
from nmcompile.native import kernels
from nmcompile.training.find_masks import masks_of
from nmcompile.weight_cache import WeightCache

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(24, 20), torch.randn(7, 24)),
    "conv": (lambda: nn.Conv2d(16, 12, 3, padding=1, groups=2), torch.randn(2, 16, 5, 6)),
    "last": (
        lambda: nn.Conv2d(8, 12, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last),
    ),
}


@pytest.fixture(autouse=True)
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Force every GEMM to run sparse; return a list with an entry for each operand that was packed for the cache."""
    calls: list[int] = []
    pack = kernels.pack_sparse
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))

    def counted(*args: Any) -> Any:
        calls.append(1)
        return pack(*args)

    monkeypatch.setattr(kernels, "pack_sparse", counted)
    monkeypatch.setattr(packed_weights, "_kept", WeightCache())
    return calls


def model(kind: str, mode: str = "weights") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = LAYERS[kind]
    compiled = nmcompile.compile(make(), mode, config=CompileConfig(ends="sparse"), backend="cpu")
    return compiled, x


def exact(compiled: nn.Module, x: Tensor) -> Tensor:
    return nmcompile.finalize(compiled)(x)


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_a_weight_is_packed_once_and_multiplies_as_before(kind: str, packed: list[int]) -> None:
    compiled, x = model(kind)
    with torch.enable_grad():
        expected = compiled(x)
    assert not packed
    results = [compiled(x) for _ in range(3)] + [compiled(x[:1])]
    assert len(packed) == (2 if kind == "conv" else 1)
    assert all(torch.equal(result, expected) for result in results[:3])
    torch.testing.assert_close(results[3], expected[:1])


def write_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2)


def write_through_data(weight: nn.Parameter) -> None:
    weight.data.mul_(3)


def put_another_in_place(weight: nn.Parameter) -> None:
    weight.data = torch.randn_like(weight)


def write_one_element(weight: nn.Parameter) -> None:
    weight.data[0, 1] = 2  # larger values would cancel in sums, whose order is the kernel's


def swap_two_elements(weight: nn.Parameter) -> None:
    values = weight.detach().numpy()
    values[0, 0], values[3, 5] = values[3, 5].copy(), values[0, 0].copy()


WRITES = [write_in_place, write_through_data, put_another_in_place, write_one_element, swap_two_elements]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_written_weight_is_packed_again(kind: str, write: Callable[[nn.Parameter], None]) -> None:
    compiled, x = model(kind)
    with torch.no_grad():
        compiled(x)
        write(compiled.weight)  # type: ignore[arg-type]
        result = compiled(x)
        for mask in masks_of(compiled).values():
            effective = torch.where(mask.tensor, compiled.weight, 0)  # type: ignore[arg-type]
        plain = nmcompile.decompile(compiled)
        plain.weight = nn.Parameter(effective)
        torch.testing.assert_close(result, plain(x))


@torch.no_grad()
def test_another_mask_packs_again(packed: list[int]) -> None:
    compiled, x = model("linear")
    compiled(x)
    (mask,) = masks_of(compiled).values()
    mask.tensor.copy_(mask.tensor.roll(4, 1))
    result = compiled(x)
    assert len(packed) == 2
    torch.testing.assert_close(result, exact(compiled, x))


def test_training_between_evaluations_keeps_nothing_stale() -> None:
    compiled, x = model("linear", "training")
    optimizer = torch.optim.SGD(compiled.parameters(), 0.5)
    for _ in range(3):
        compiled(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), exact(compiled, x))


@pytest.mark.parametrize("fused", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_counts_no_version_keeps_nothing_stale(fused: type[torch.optim.Optimizer]) -> None:
    """Some features are always off, so their weights never change."""
    compiled = nmcompile.compile(nn.Linear(64, 64), "weights", config=CompileConfig(ends="sparse"), backend="cpu")
    optimizer = fused(compiled.parameters(), lr=0.1, weight_decay=0.0, fused=True)  # type: ignore[call-arg]
    x = torch.rand(32, 64)
    x[:, ::2] = 0
    loss = compiled(x).square().mean()
    with torch.no_grad():
        compiled(x)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), exact(compiled, x))


def test_a_call_with_gradients_forgets_what_is_kept() -> None:
    """A weight may be trained by something other than a torch optimizer."""
    compiled, x = model("linear")
    with torch.no_grad():
        compiled(x)
    assert len(packed_weights._kept) == 1
    compiled(x)
    assert len(packed_weights._kept) == 0


class Sharded(Tensor):
    """The part of a weight, spread over ranks, that an optimizer holds."""


def test_a_step_on_shards_forgets_everything() -> None:
    compiled, x = model("linear")
    with torch.no_grad():
        compiled(x)
    shard = nn.Parameter(torch.zeros(2).as_subclass(Sharded))
    shard.grad = torch.ones_like(shard)
    torch.optim.SGD([shard], 0.1).step()
    assert len(packed_weights._kept) == 0


@torch.no_grad()
def test_an_expanded_weight_is_kept_too() -> None:
    compiled = nmcompile.compile(nn.Linear(8, 64, bias=False), "weights", config=CompileConfig(ends="sparse"))
    compiled.weight = nn.Parameter(torch.randn(1, 8).expand(64, 8))
    x = torch.randn(3, 8)
    (mask,) = masks_of(compiled).values()
    mask.mark_stale()
    results = [compiled(x) for _ in range(2)]
    expected = x @ torch.where(mask.tensor, compiled.weight, 0.0).t()
    torch.testing.assert_close(results, [expected, expected])


@torch.no_grad()
def test_threads_that_pack_at_the_same_time_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, x = model("conv")
    expected, pack, meeting = compiled(x), kernels.pack_sparse, threading.Barrier(2)
    monkeypatch.setattr(packed_weights, "_kept", WeightCache())

    def slow(*args: Any) -> Any:
        meeting.wait(60)
        return pack(*args)

    monkeypatch.setattr(kernels, "pack_sparse", slow)
    run = torch.inference_mode()(compiled.forward)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, [x, x]))
    assert all(torch.equal(result, expected) for result in (*results, compiled(x)))


@torch.inference_mode()
def test_inference_mode_keeps_packed_weights_too(packed: list[int]) -> None:
    compiled, x = model("linear")
    assert torch.equal(compiled(x), compiled(x))


@torch.no_grad()
def test_an_operand_that_is_not_2_4_runs_dense() -> None:
    compiled, x = model("linear")
    (mask,) = masks_of(compiled).values()
    compiled(x)
    mask.tensor.fill_(True)
    expected = nn.functional.linear(x, compiled.weight, compiled.bias)  # type: ignore[arg-type]
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)


@torch.no_grad()
def test_where_the_dense_kernel_is_faster_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, x = model("linear")
    compiled(x)
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("dense", "the test asks for it"))
    compiled(x)
    assert len(packed_weights._kept) == 0


@torch.no_grad()
def test_a_dead_model_leaves_nothing_behind() -> None:
    compiled, x = model("linear")
    compiled(x)
    assert len(packed_weights._kept) == 1
    del compiled
    gc.collect()
    assert len(packed_weights._kept) == 0
