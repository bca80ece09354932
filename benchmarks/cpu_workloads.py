"""Models on a CPU with a batch to train on: an MLP, ResNet-18, ViT-S/16, and small blocks of a Llama."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from llama import Blocks, Shape
from torch import Tensor, nn
from vision import models

from nmcompile import CompileConfig


@dataclass(frozen=True)
class Workload:
    """A model, a batch for it, the loss of its output, and the configuration of its pruning, with masks that stand."""

    model: nn.Module
    x: Tensor
    loss: Callable[[Tensor], Tensor]
    config: CompileConfig


def mlp(tokens: int) -> Workload:
    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))
    return Workload(model, torch.randn(tokens, 1024), class_loss, CompileConfig(ends="sparse", refresh=None))


def resnet18(batch: int, layout: torch.memory_format) -> Workload:
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=layout)
    model = models.resnet18().to(memory_format=layout)  # type: ignore[call-overload]
    return Workload(model, x, class_loss, CompileConfig(refresh=None))


def vit_small(batch: int) -> Workload:
    model = models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536
    )
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision's is zero, and all gradients with it
    return Workload(model, torch.randn(batch, 3, 224, 224), class_loss, CompileConfig(refresh=None))


def llama_blocks(batch: int, tokens: int, dtype: torch.dtype) -> Workload:
    """Return four blocks of Llama 3 8B's proportions; they are in the middle of a model, so none is an end."""
    shape = Shape(width=768, heads=6, key_heads=2, hidden=2688)
    x, target = torch.randn(2, batch, tokens, shape.width, dtype=dtype)

    def loss(output: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, target)

    return Workload(Blocks(4, tokens, shape).to(dtype), x, loss, CompileConfig(ends="sparse", refresh=None))


def class_loss(output: Tensor) -> Tensor:
    labels = torch.arange(len(output)) % output.shape[1]
    return nn.functional.cross_entropy(output.float(), labels)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "MLP 1024-4096-1024, 4096 tokens": lambda: mlp(4096),
    "ResNet-18, batch 8, NCHW": lambda: resnet18(8, torch.contiguous_format),
    "ResNet-18, batch 8, channels last": lambda: resnet18(8, torch.channels_last),
    "ResNet-18, batch 32, NCHW": lambda: resnet18(32, torch.contiguous_format),
    "ResNet-18, batch 32, channels last": lambda: resnet18(32, torch.channels_last),
    "ViT-S/16, batch 8": lambda: vit_small(8),
    "four Llama blocks of width 768, 4 x 128 tokens": lambda: llama_blocks(4, 128, torch.float32),
    "the same blocks in bfloat16": lambda: llama_blocks(4, 128, torch.bfloat16),
}
