"""Predicted times of a layer's GEMMs: sizes, and what pruning costs on a GPU, with a library that PyTorch computes."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from nmcompile import CompileConfig, Phase, presets
from nmcompile.api.layer_costs import Seconds, Setting, gemm_of, predict_phases
from nmcompile.api.pipeline import lowered
from nmcompile.backends.cusparselt import CusparseltBackend
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.backends.shared.cost_model import Gemm
from nmcompile.backends.triton import TritonBackend
from nmcompile.capture import capture_model
from nmcompile.ir.layers import LinearLayer, conv_layer
from nmcompile.ir.protocols import Backend
from nmcompile.planning.plan_phases import plan_phases
from tests.backends.fake_cusparselt import FakeLibrary

BF16 = torch.bfloat16
SETTING = Setting(13008, "cuda", BF16, is_trained=True, passes_gradient=True)


def predicted(
    layer: nn.Module, setting: Setting = SETTING, mode: str = "training", backend: Backend | None = None
) -> Mapping[Phase, Seconds] | None:
    """Predict the times of a layer that the backends of a GPU take."""
    captured = capture_model(nn.Sequential(layer))
    plan = plan_phases(captured, presets[mode], CompileConfig(ends="sparse"))
    own = CusparseltBackend(FakeLibrary()) if backend is None else backend
    three = lowered(captured, plan, (TritonBackend(), own, ReferenceBackend())).layers["0"]
    return predict_phases(three, setting)


def test_sizes_of_the_three_gemms() -> None:
    linear = LinearLayer("a", (12, 8), True)
    assert gemm_of(linear, Phase.FORWARD, 5, BF16) == Gemm(12, 8, 5, 1, True, BF16)
    assert gemm_of(linear, Phase.BACKWARD, 5, BF16) == Gemm(8, 12, 5, 1, True, BF16)
    assert gemm_of(linear, Phase.UPDATE, 5, BF16) == Gemm(12, 5, 8, 1, True, BF16)
    conv = conv_layer("a", (12, 4, 3, 3), True, groups=2)
    for phase in Phase:
        gemm = gemm_of(conv, phase, 5, BF16)
        assert gemm.groups == 2 and not gemm.is_linear and gemm.multiplications == 5 * conv.parameters


# Milliseconds of the GEMMs of ViT-L's MLP as they were measured in training: dense kernels, then sparse ones.
MEASURED = {
    (1024, 4096): {Phase.FORWARD: (0.17, 0.14), Phase.UPDATE: (0.22, 0.20)},
    (4096, 1024): {Phase.FORWARD: (0.15, 0.12)},
}


@pytest.mark.parametrize("size", MEASURED)
def test_a_gpu_is_predicted_as_it_was_measured(size: tuple[int, int]) -> None:
    seconds = predicted(nn.Linear(*size))
    assert seconds is not None
    for phase, (_, sparse) in MEASURED[size].items():
        assert seconds[phase].pruned == pytest.approx(sparse * 1e-3, rel=0.25)


def test_on_a_gpu_pruning_pays_where_the_product_repays_its_passes() -> None:
    wide = predicted(nn.Linear(4096, 14336), SETTING._replace(positions=16384))
    assert wide is not None and all(one.pruned < 0.85 * one.dense for one in wide.values())
    narrow = predicted(nn.Linear(1024, 4096))
    assert narrow is not None and narrow[Phase.FORWARD].pruned < narrow[Phase.FORWARD].dense
    assert narrow[Phase.UPDATE].pruned > narrow[Phase.UPDATE].dense, "the gradient is as large as the product is small"


@pytest.mark.parametrize("layer", [nn.Conv2d(256, 256, 3), nn.Linear(64, 64), nn.Conv2d(64, 64, 1)])
def test_on_a_gpu_what_has_no_kernel_or_is_small_costs_its_pruning(layer: nn.Module) -> None:
    seconds = predicted(layer)
    assert seconds is not None and all(one.pruned > one.dense for one in seconds.values())


def test_only_the_gemms_of_a_step_count() -> None:
    forward = predicted(nn.Linear(64, 64), SETTING._replace(is_trained=False))
    assert forward is not None and set(forward) == {Phase.FORWARD}
    first = predicted(nn.Linear(64, 64), SETTING._replace(passes_gradient=False))
    assert first is not None and set(first) == {Phase.FORWARD, Phase.UPDATE}


def test_a_cached_weight_costs_no_pass() -> None:
    for layer in (nn.Linear(1024, 1024), nn.Linear(64, 64)):
        trained, cached = (predicted(layer, SETTING._replace(is_trained=one), "weights") for one in (True, False))
        assert trained is not None and cached is not None
        assert cached[Phase.FORWARD].pruned < trained[Phase.FORWARD].pruned


class Custom(CusparseltBackend):
    """A backend of someone else, whose kernels no model knows."""

    def __init__(self) -> None:
        super().__init__(FakeLibrary(), "custom")


@pytest.mark.parametrize(
    ("setting", "mode", "backend"),
    [
        (SETTING._replace(device="xpu"), "training", None),
        (SETTING._replace(device="cpu", dtype=BF16), "training", None),
        (SETTING, "inference", None),
        (SETTING, "training", Custom()),
    ],
)
def test_nothing_is_predicted_for_what_no_model_knows(setting: Setting, mode: str, backend: Backend | None) -> None:
    assert predicted(nn.Linear(64, 64), setting, mode, backend) is None
