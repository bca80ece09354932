"""A module whose layers all have four bits gives what its runtime gives, bit for bit: both sum integers."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig
from nmcompile.backends.cpu.kernels import kernel_support
from tests.backends.grid_convolutions import kernels_of
from tests.export.test_whole_networks import Block

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)
X = torch.randn(3, 8, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Let integers be chosen without a measurement."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def network() -> nn.Sequential:
    """Return layers of every kind: strides, groups, a dilation, norms, residual sums, and a linear end."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(Block(16, 16), Block(16, 32), nn.Conv2d(32, 32, 3, (2, 1), (1, 2)), nn.ReLU()),
        *(nn.Conv2d(32, 32, (3, 1), padding=(2, 0), dilation=2, groups=2), nn.Hardtanh(-0.5, 0.5)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 12)),
    )
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
            norm.running_mean, norm.running_var = 0.3 * torch.randn_like(norm.bias), 0.5 + torch.rand_like(norm.bias)
    return net.eval()


def compiled(prunes_inputs: bool, granularity: str) -> nn.Module:
    preset = nmcompile.presets["inference"]
    every = preset if prunes_inputs else LayerConfig(preset.weight, weight_bits=4, input_bits=4)
    config = CompileConfig(
        layers={"_default": every}, ends="sparse", clip="percentile", granularity=granularity, outputs="int8"
    )
    return nmcompile.compile(network(), "inference", args=(X,), config=config, calibration=[X], backend="cpu").eval()


def check(model: nn.Module, runtime: nmcompile.Runtime, inputs: Tensor) -> None:
    for x in inputs:
        assert torch.equal(model(x), runtime(x))
    assert set(kernels_of(model)) == {"integers"}


@torch.no_grad()
@pytest.mark.parametrize(("prunes_inputs", "granularity"), [(True, "tensor"), (False, "channel")])
def test_results_are_equal(prunes_inputs: bool, granularity: str) -> None:
    model = compiled(prunes_inputs, granularity)
    runtime = nmcompile.runtime(model, (X,))
    inputs = torch.tensor([0, 0.1, 1, 2, 5, 100]).view(-1, 1, 1, 1, 1) * torch.randn(6, *X.shape)
    check(model, runtime, inputs)
    nmcompile.freeze(model)
    check(model, runtime, inputs)


@torch.no_grad()
def test_a_thousand_inputs() -> None:
    """One code in a million that is rounded otherwise would show."""
    model, inputs = compiled(prunes_inputs=False, granularity="tensor"), 2 * torch.randn(2, 500, 8, 8, 8)
    nmcompile.freeze(model)
    check(model, nmcompile.runtime(model, (inputs[0],)), inputs)
