"""Architectures as people use them: every conv and linear is three GEMMs or has a reason, and training works."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import nmcompile

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
GEMMS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


def vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=10, **options)


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "resnet18": (vision("resnet18"), IMAGES),
    "resnet50": (vision("resnet50"), IMAGES),
    "vgg16_bn": (vision("vgg16_bn"), IMAGES[..., :32, :32]),
    "mobilenet_v2": (vision("mobilenet_v2"), IMAGES),
    "vit_b_16": (vision("vit_b_16", image_size=32), IMAGES[..., :32, :32]),
    "bert": (bert, TOKENS),
    "gpt2": (gpt2, TOKENS),
    "hf resnet": (resnet, IMAGES),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = MODELS[name]
    return make(), x


def scores(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    result: Tensor = output if isinstance(output, Tensor) else output.logits
    return result


def gemm_layers(model: nn.Module) -> set[str]:
    """The names under which reports list the layers: of modules, and of attention's packed projection."""
    names = {name for name, module in model.named_modules() if isinstance(module, GEMMS)}
    attentions = (name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention))
    return names | {f"{name}.in_proj" for name in attentions}


def train(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    logits = scores(model, x).flatten(0, -2)
    loss = nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()


@pytest.mark.parametrize("with_args", [True, False], ids=["args", "no args"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_rewritten_or_has_a_reason_and_trains(name: str, with_args: bool) -> None:
    model, x = made(name)
    compiled = nmcompile.compile(model, "training", args=(x,) if with_args else None, inplace=True)
    before = [parameter.detach().clone() for parameter in compiled.parameters()]
    train(compiled, x)
    assert any(not torch.equal(old, new) for old, new in zip(before, compiled.parameters(), strict=True))
    report = nmcompile.inspect(compiled)
    assert {layer.name for layer in report.layers} == gemm_layers(compiled)
    for layer in report.layers:
        is_rewritten = layer.plan.rewritten and layer.status == "sparse"
        assert is_rewritten or any(row.reason for row in layer.plan.rows), layer.name
    assert 0 < report.summary["sparse_layers"] < len(report.layers)
    assert nmcompile.verify(compiled).ok


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "bert", "gpt2"])
def test_every_pruned_operand_of_a_step_holds_its_pattern(name: str) -> None:
    model, x = made(name)
    compiled = nmcompile.compile(model, "training", args=(x,), inplace=True)
    report = nmcompile.verify(compiled, step=lambda: scores(compiled, x).square().mean().backward())
    sparse = nmcompile.inspect(compiled).summary["sparse_layers"]
    assert report.ok and sum("update" in check.name for check in report.checks) >= sparse


def test_gpt2_still_generates() -> None:
    model, x = made("gpt2")
    compiled: Any = nmcompile.compile(model, "weights")
    compiled.eval()
    assert compiled.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)
    assert isinstance(compiled, transformers.GPT2LMHeadModel)
