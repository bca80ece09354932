"""Models on a GPU in bfloat16 with a batch to train on: two MLPs, ViT-L/16, ResNet-50, and blocks of Llama 3 8B."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from llama import Blocks, Shape
from torch import Tensor, nn
from vision import models

from nmcompile import CompileConfig

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """A model, a batch for it, and the configuration of its pruning.

    Without a loss, a step is forward and backward from a random gradient. With one, the optimizer steps too.
    """

    model: nn.Module
    x: Tensor
    config: CompileConfig
    loss: Loss | None = None


def mlp(tokens: int, width: int, hidden: int) -> Workload:
    model = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    return Workload(model, on_gpu(tokens, width).requires_grad_(), CompileConfig(ends="sparse", refresh=None))


def vit_large(batch: int) -> Workload:
    model = models.vit_l_16()
    nn.init.normal_(model.heads.head.weight, std=0.01)  # torchvision's is zero, and all gradients with it
    return Workload(model, on_gpu(batch, 3, 224, 224), CompileConfig(refresh=None), class_loss)


def resnet50(batch: int) -> Workload:
    model = models.resnet50().to(memory_format=torch.channels_last)
    x = on_gpu(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    return Workload(model, x, CompileConfig(refresh=None), class_loss)


def llama_blocks(batch: int, tokens: int, count: int) -> Workload:
    shape = Shape()
    target = on_gpu(batch, tokens, shape.width)

    def loss(output: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, target)

    # The blocks stand in the middle of a model, so that none of their layers is its first or last one.
    config = CompileConfig(ends="sparse", refresh=None)
    return Workload(Blocks(count, tokens, shape), on_gpu(batch, tokens, shape.width), config, loss)


def class_loss(output: Tensor) -> Tensor:
    labels = torch.arange(len(output), device=output.device) % output.shape[1]
    return nn.functional.cross_entropy(output.float(), labels)


def on_gpu(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "MLP of ViT-L, 13008 tokens": lambda: mlp(13008, 1024, 4096),
    "MLP 4096-14336-4096, 16384 tokens": lambda: mlp(16384, 4096, 14336),
    "ViT-L/16, batch 192": lambda: vit_large(192),
    "ResNet-50, batch 256, channels last": lambda: resnet50(256),
    "four blocks of Llama 3 8B, 4 x 4096 tokens": lambda: llama_blocks(4, 4096, 4),
}
