"""A layer's output has its own memory, in every mode: operators may write to it in place, as after eager layers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import nmcompile
from nmcompile import CompileConfig

SPARSE = CompileConfig(ends="sparse")
MODES = "dense", "weights", "training"


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tokens": (lambda: nn.Linear(8, 8), (2, 3, 8)),
    "tokens, no bias": (lambda: nn.Linear(8, 8, bias=False), (2, 3, 8)),
    "one sample": (lambda: nn.Linear(8, 8), (8,)),
    "no tokens": (lambda: nn.Linear(8, 8), (2, 0, 8)),
    "Hugging Face's Conv1D": (lambda: Conv1D(8, 8), (2, 3, 8)),
    "functional": (Functional, (2, 3, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 8, 3), (2, 8, 5)),
    "conv1d, one sample": (lambda: nn.Conv1d(8, 8, 3), (8, 5)),
    "conv1d, groups": (lambda: nn.Conv1d(8, 8, 3, groups=2), (2, 8, 5)),
    "conv1d, circular": (lambda: nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"), (2, 8, 5)),
    "conv2d, one sample": (lambda: nn.Conv2d(8, 8, 3), (8, 4, 4)),
    "conv2d, no samples": (lambda: nn.Conv2d(8, 8, 3), (0, 8, 4, 4)),
}


def _relu(h: Tensor) -> Tensor:
    return h.relu_()


def _add(h: Tensor) -> Tensor:
    h += 1
    return h


def _select(h: Tensor) -> Tensor:
    h[..., 0] = 0
    return h


def _where(h: Tensor) -> Tensor:
    h[h > 0.5] = 2.0
    return h


WRITES = _relu, _add, _select, _where


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_writes_to_an_output(name: str, mode: str) -> None:
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    compiled = nmcompile.compile(nn.Sequential(layer), mode, config=SPARSE)
    assert not compiled(x)._is_view()
    for write in WRITES:
        whole = compiled(x)
        expected, written = write(whole.detach().clone()), write(compiled(x))
        assert torch.equal(written, expected)
        written.sum().backward()
        with torch.no_grad():
            assert torch.equal(write(compiled(x)), expected)
            assert not compiled(x)._is_view()
    with torch.autocast("cpu", torch.bfloat16):
        write = WRITES[0]
        assert torch.equal(write(compiled(x)), compiled(x).relu())


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_behind_a_write_are_those_of_eager(name: str, write: Callable[[Tensor], Tensor]) -> None:
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    compiled = nmcompile.compile(nn.Sequential(layer), "dense")
    found, expected = (
        torch.autograd.grad(write(model(x)).square().sum(), list(layer.parameters())) for model in (compiled, layer)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def swin_of_torchvision() -> nn.Module:
    swin = torchvision.models.swin_transformer
    blocks: dict[str, Any] = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return swin.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=4, **blocks)


def swin_of_timm() -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    return timm.models.swin_transformer_v2.SwinTransformerV2(num_classes=4, **sizes)


def swin_of_transformers() -> nn.Module:
    config = transformers.Swinv2Config(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    return transformers.Swinv2Model(config)


def wav2vec2() -> nn.Module:
    """Make a model with SpecAugment, which writes over the projected features."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    convs: dict[str, Any] = {
        "conv_dim": (16, 16),
        "conv_stride": (4, 4),
        "conv_kernel": (8, 4),
        "num_conv_pos_embeddings": 16,
    }
    masks: dict[str, Any] = {
        "mask_time_prob": 0.5,
        "mask_time_length": 2,
        "mask_time_min_masks": 1,
        "num_conv_pos_embedding_groups": 2,
    }
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **convs, **masks))


IMAGES, SOUND = torch.randn(2, 3, 32, 32), torch.randn(2, 400)


@pytest.mark.parametrize(
    ("build", "x"),
    [(swin_of_torchvision, IMAGES), (swin_of_timm, IMAGES), (swin_of_transformers, IMAGES), (wav2vec2, SOUND)],
)
def test_models_that_write_in_place_train_as_in_eager(build: Callable[[], nn.Module], x: Tensor) -> None:
    model = build().train()
    gradients = []
    for one in (model, nmcompile.compile(model, "dense")):
        torch.manual_seed(1)
        np.random.seed(1)
        output = one(x)
        output = output if isinstance(output, Tensor) else output.last_hidden_state
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(output.square().mean(), parameters, allow_unused=True))
    for found, expected in zip(*gradients, strict=True):
        assert (found is None and expected is None) or torch.equal(found, expected)
    sparse = nmcompile.compile(model, "training")
    output = sparse(x)
    (output if isinstance(output, Tensor) else output.last_hidden_state).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
