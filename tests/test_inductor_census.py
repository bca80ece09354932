"""Inductor copies nothing for our operators: a sparse step moves no more through loops than the dense one does."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.cpu.kernels import kernel_support
from tests.inductor_census import Census, census_of

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)

IMAGES, TOKENS = torch.randn(4, 3, 6, 6), torch.randn(4, 8, 16)


def stages() -> nn.Module:
    """Return three convolutions, of which inductor computes the dense ones in channels last."""

    def stage(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]

    return nn.Sequential(*stage(3), *stage(8), *stage(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Attention(nn.Module):
    """A block whose self-attention transposes tokens, between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        normed = self.norm(x)
        mixed: Tensor = x + self.attention(normed, normed, normed, need_weights=False)[0]
        logits: Tensor = self.last(mixed)
        return logits


Make = Callable[[], nn.Module]
CASES: dict[Make, tuple[Tensor, CompileConfig]] = {
    # A choice like those of where="pays": ours between dense ones.
    stages: (IMAGES, CompileConfig(layers={"6": None})),
    Attention: (TOKENS, CompileConfig()),
}


@cache
def census(make: Make, is_sparse: bool) -> Census:
    torch.manual_seed(0)
    x, config = CASES[make]
    model = make()
    return census_of(nmcompile.compile(model, "training", config=config) if is_sparse else model, x)


@pytest.mark.parametrize("make", CASES)
def test_a_sparse_step_moves_no_more_through_loops(make: Make) -> None:
    sparse, dense = census(make, is_sparse=True), census(make, is_sparse=False)
    assert sparse.calls and not dense.calls
    assert sparse.loops <= dense.loops and sparse.bytes_moved <= dense.bytes_moved


def test_images_between_dense_convolutions_stay_channels_last() -> None:
    calls = census(stages, is_sparse=True).calls
    assert set(calls) == {"cpu_conv_forward", "cpu_conv_input_gradient", "cpu_conv_weight_gradient", "cpu_prune"}
    read = [operand.layout for each in calls.values() for operands in each for operand in operands]
    images = [x for x in read if x.dim() == 4 and len(x) == len(IMAGES)]
    assert len(images) == 6 and all(x.is_contiguous(memory_format=torch.channels_last) for x in images)


def test_both_gradients_of_a_layer_read_one_copy_of_a_transposed_gradient() -> None:
    calls = census(Attention, is_sparse=True).calls
    gradients = [calls["cpu_linear_input_gradient"], calls["cpu_linear_pruned_weight_gradient"]]
    of_input, of_weight = ([operands[0].buffer for operands in each] for each in gradients)
    assert len(of_input) == 2 and sorted(of_input) == sorted(of_weight)


def test_weights_and_masks_of_ours_are_read_as_they_lie() -> None:
    """Inductor copies the weights of convolutions before a dense one to channels last, before each step."""
    calls = census(stages, is_sparse=True).calls
    read = [operand for each in calls.values() for operands in each for operand in operands]
    kernels = [x for x in read if x.layout.shape == (8, 8, 3, 3)]
    assert len(kernels) == 5 and all(x.buffer.startswith("primals") and x.layout.is_contiguous() for x in kernels)
