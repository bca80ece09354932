"""Models whose reports are opened in a browser: layers as many as the real ones have, narrow where width costs time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nmcompile
from nmcompile.report.report import Report

Built = tuple[nn.Module, tuple[Tensor, ...]]


def resnet18() -> Built:
    from torchvision.models import resnet18 as build

    return build(), (torch.randn(2, 3, 64, 64),)


def vit_b() -> Built:
    from torchvision.models import VisionTransformer

    sizes: Any = {"image_size": 32, "patch_size": 16, "num_layers": 12, "num_heads": 12, "hidden_dim": 96}
    model = VisionTransformer(**sizes, mlp_dim=384)
    nn.init.normal_(model.get_parameter("heads.head.weight"))  # it is zero, and so would be the gradients before it
    return model, (torch.randn(2, 3, 32, 32),)


def bert() -> Built:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: Any = {"hidden_size": 96, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 384}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=128)), (torch.randint(128, (2, 16)),)


def llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 30, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=128))
    return model, (torch.randint(128, (2, 8)),)


def trained(build: Callable[[], Built]) -> tuple[nn.Module, Report]:
    """Return a model that was compiled for training and made a step, and the report on it with all its figures."""
    model, args = build()
    compiled = nmcompile.compile(model, "training", args=args)
    return compiled, nmcompile.inspect(compiled, args=args)


def deployed(build: Callable[[], Built]) -> tuple[nn.Module, Report]:
    """Return a model that was compiled for inference, and the report on it with all its figures."""
    model, args = build()
    compiled = nmcompile.compile(model.eval(), "inference", args=args, calibration=[args[0]])
    return compiled, nmcompile.inspect(compiled, args=args)


REPORTS: dict[str, Callable[[], tuple[nn.Module, Report]]] = {
    "resnet18 training": lambda: trained(resnet18),
    "resnet18 inference": lambda: deployed(resnet18),
    "vit-b": lambda: trained(vit_b),
    "bert": lambda: trained(bert),
    "llama": lambda: trained(llama),
}
