"""The choice of kernels on a GPU: rules as functions, and what is timed, with a library that PyTorch computes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.cusparselt import CusparseltBackend
from nmcompile.backends.cusparselt.kept_weights import kept_for
from nmcompile.backends.cusparselt.operators import (
    linear_forward,
    linear_input_gradient,
    pointwise_forward,
    pointwise_input_gradient,
)
from nmcompile.backends.cusparselt.random_operands import random_like
from nmcompile.backends.cusparselt.update import linear_parameter_gradients, linear_weight_gradient
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.backends.shared.choose_kernel import SMALL, SMALL_ON_GPU, Trial, faster, is_small, run_best
from nmcompile.backends.shared.known_choices import forget, known_choices
from nmcompile.backends.shared.saved_choices import load_choices, save_choices
from nmcompile.ir.choice import Choice
from nmcompile.ir.choice_slot import ChoiceSlot
from tests.backends.fake_cusparselt import FakeLibrary

Kernel = Callable[[], Any]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    """Return a library on CPU tensors for products that are all large enough to be timed."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choices, "SMALL_ON_GPU", 1)
    forget()
    yield FakeLibrary()
    forget()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the results of the kernels that are timed, the dense one first; the sparse one is twice as fast."""
    results: list[Any] = []

    def seconds(run: Kernel, device: torch.device | None) -> float:
        results.append(run())
        return 1.0 if len(results) % 2 else 0.5

    monkeypatch.setattr(choices, "seconds", seconds)
    return results


@pytest.mark.parametrize(
    ("sparse", "dense", "on_gpu", "chosen"),
    [
        (0.94, 1.0, True, "sparse"),
        (0.96, 1.0, True, "dense"),
        (30e-6, 44e-6, True, "dense"),
        (30e-6, 46e-6, True, "sparse"),
        (30e-6, 44e-6, False, "sparse"),
    ],
)
def test_on_a_gpu_the_sparse_kernel_has_to_gain_its_launch(
    sparse: float, dense: float, on_gpu: bool, chosen: str
) -> None:
    kernel, reason = faster(sparse, dense, on_gpu)
    assert kernel == chosen
    assert ("15 µs" in reason) == (dense < 1 and chosen == "dense")


def test_a_dense_kernel_that_is_slower_says_why_it_runs() -> None:
    kernel, reason = faster(30e-6, 44e-6, True)
    shown = str(Choice(kernel, reason, 1.2, 44e-6, 30e-6))
    assert shown.startswith("dense: 0.04 / 0.03 ms = 1.47, predicted 1.20; a gain of less than the 15 µs")


def test_what_is_small_depends_on_the_device() -> None:
    assert is_small(SMALL_ON_GPU - 1, on_gpu=True) and not is_small(SMALL_ON_GPU, on_gpu=True)
    assert is_small(SMALL - 1, on_gpu=False) and not is_small(SMALL, on_gpu=False)


def test_a_small_product_of_a_gpu_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(torch.device("cuda"), lambda: pytest.fail("operands were made"))
    size = SMALL_ON_GPU - 1
    _, choice = run_best(lambda: pytest.fail("asked"), size, lambda: None, lambda: None, lambda: None, trial)
    assert choice == choices.small(size) and choice.kernel == "dense"


def test_without_room_for_random_operands_the_dense_kernel_runs_and_is_not_saved(tmp_path: Path) -> None:
    attempts: list[int] = []

    def out_of_memory() -> tuple[Kernel, Kernel]:
        attempts.append(1)
        raise torch.OutOfMemoryError

    forget()
    for _ in range(2):
        trial = Trial(torch.device("cuda"), out_of_memory)
        result, choice = run_best(lambda: "a", SMALL_ON_GPU, lambda: None, lambda: 1, lambda: 0, trial)
        assert result == 0 and choice == choices.UNFIT
    assert len(attempts) == 1, "tried in every call"
    save_choices(tmp_path / "choices.json")
    forget()
    load_choices(tmp_path / "choices.json")
    assert not known_choices()


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(6, 8).t(),
        torch.full((2, 4, 3, 3), torch.nan).contiguous(memory_format=torch.channels_last),
        torch.zeros(20, 8, dtype=torch.bfloat16)[::2, 1:],
        torch.zeros(1, 8).expand(4, 8),
    ],
)
def test_random_operands_are_like_the_given_ones(x: Tensor) -> None:
    state = torch.get_rng_state()
    like = random_like(x)
    assert (like.shape, like.stride(), like.dtype) == (x.shape, x.stride(), x.dtype)
    assert like.isfinite().all() and like.count_nonzero() > 0.9 * like.numel()
    assert torch.equal(torch.get_rng_state(), state)
    assert not isinstance(like, nn.Parameter) and isinstance(random_like(nn.Parameter(x)), nn.Parameter)


def calls(value: float, library: str, slot: str) -> dict[str, tuple[Kernel, int]]:
    """Return each operator on a sparse operand of zeros and a dense one of `value`, with its number of results."""

    def full(*shape: int) -> Tensor:
        return torch.full(shape, value)

    zeros = torch.zeros

    mask = (torch.arange(64) % 4 < 2).expand(64, 64).contiguous()
    update = "keep", 2, 4, "flat", None, False, library, slot
    drawn = "mvue", 2, 4, "flat", torch.tensor(1), False, library, slot
    image, weight, bias = full(2, 64, 2, 2), zeros(64, 64, 1, 1), full(64)
    return {
        "forward": (lambda: linear_forward(full(8, 64), zeros(64, 64), mask, bias, False, library, slot), 1),
        "forward, zeros": (lambda: linear_forward(full(8, 64), zeros(64, 64), None, None, True, library, slot), 1),
        "backward": (lambda: linear_input_gradient(full(8, 64), zeros(64, 64), mask.t(), False, library, slot), 1),
        "1x1": (lambda: pointwise_forward(image, weight, mask[:, :, None, None], bias, library, slot), 1),
        "1x1 backward": (lambda: pointwise_input_gradient(image, weight, None, image, library, slot), 1),
        "update": (lambda: linear_weight_gradient(zeros(4, 16, 64), full(4, 16, 64), *update), 1),
        "update of a transposed gradient": (
            lambda: linear_weight_gradient(zeros(16, 4, 64).transpose(0, 1), full(4, 16, 64), *update),
            1,
        ),
        "update, drawn, and its sum": (
            lambda: linear_parameter_gradients(zeros(4, 16, 64), full(4, 16, 64), *drawn),
            2,
        ),
    }


@pytest.mark.parametrize("value", [0.0, torch.nan])
@pytest.mark.parametrize("case", list(calls(0.0, "", "")))
def test_kernels_are_timed_on_random_operands_whatever_the_call_multiplies(
    case: str, value: float, fake: FakeLibrary, timed: list[Any]
) -> None:
    slot = ChoiceSlot("fc forward")
    call, count = calls(value, fake.name, slot.name)[case]
    result = call()
    shapes = [x.shape for x in ([result] if count == 1 else result)]
    dense, sparse = timed[-2:]
    for one in (dense, sparse):
        results = [one] if count == 1 else one
        assert [x.shape for x in results] == shapes
        assert all(x.isfinite().all() and x.count_nonzero() > 0.9 * x.numel() for x in results)
    torch.testing.assert_close(sparse, dense)
    assert slot.latest is not None and slot.latest.kernel == "sparse" and slot.latest.speedup == 2
    before = len(timed)
    call()
    assert len(timed) == before, "measured again"


def test_a_cached_weight_is_timed_as_cached_and_nothing_of_the_trial_stays(fake: FakeLibrary, timed: list[Any]) -> None:
    config, layer = CompileConfig(ends="sparse"), nn.Linear(64, 64)
    compiled = nmcompile.compile(layer, "weights", config=config, backend=CusparseltBackend(fake))
    with torch.no_grad():
        compiled(torch.randn(8, 64))
    search, trial, call = 1, 1, 1
    assert len(fake.functions.compressions) == search + trial + call
    forms = kept_for(fake).forms
    assert [len(forms[kernel]) for kernel in ("sparse", "dense")] == [1, 0]
    assert forms["sparse"].weights()[0] is layer.weight
