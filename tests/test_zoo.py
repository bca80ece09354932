"""Architectures as people use them: every conv and linear is three GEMMs or has a reason, and training works."""

from collections.abc import Callable, Iterable
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


def vision(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=10)


def vgg16_bn() -> nn.Module:
    """Make VGG-16 with a head of 64 features: the original's has 120 of its 135 million parameters."""
    vgg = torchvision.models.vgg
    model = vgg.VGG(vgg.make_layers(vgg.cfgs["D"], batch_norm=True), num_classes=10, init_weights=False)
    model.classifier[0] = nn.Linear(model.classifier[0].in_features, 64)
    model.classifier[3] = nn.Linear(64, 64)
    model.classifier[6] = nn.Linear(64, 10)
    return model


def vit_b_16() -> nn.Module:
    """Make ViT-B/16 with two of its twelve blocks, and a head that is not zero: zero would pass no gradient."""
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=12, hidden_dim=768, mlp_dim=3072, num_classes=10
    )
    nn.init.normal_(model.get_parameter("heads.head.weight"), std=0.02)
    return model


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
    "vgg16_bn": (vgg16_bn, IMAGES[..., :32, :32]),
    "mobilenet_v2": (vision("mobilenet_v2"), IMAGES),
    "vit_b_16": (vit_b_16, IMAGES[..., :32, :32]),
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


def gemm_weights(model: nn.Module) -> dict[str, str]:
    """Return the weights of all layers by the names that reports give the layers, found without nmcompile."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, GEMMS):
            weights[name] = f"{name}.weight"
        elif isinstance(module, nn.MultiheadAttention):
            weights[f"{name}.in_proj"] = f"{name}.in_proj_weight"
    return weights


def train(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = scores(model, x).flatten(0, -2)
    loss = nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()


def check_layers(compiled: nn.Module, expected: Iterable[str]) -> None:
    """Check that every layer is in the report, and that each of its GEMMs is pruned or says why not."""
    report = nmcompile.inspect(compiled)
    assert {layer.name for layer in report.layers} == set(expected)
    for layer in report.layers:
        assert layer.status in ("sparse", "dense"), layer.name
        for phase in nmcompile.Phase:
            rows = layer.plan.rows_of(phase)
            assert rows and all(row.is_sparse or row.reason for row in rows), (layer.name, phase)
    assert 0 < report.summary["sparse_layers"] < len(report.layers)


@pytest.mark.parametrize("name", MODELS)
def test_without_example_inputs_every_layer_is_planned_and_trains(name: str) -> None:
    model, x = made(name)
    weights = gemm_weights(model)
    compiled = nmcompile.compile(model, "training", inplace=True)
    before = {name: compiled.get_parameter(name).detach().clone() for name in weights.values()}
    train(compiled, x)
    assert [name for name, old in before.items() if old.equal(compiled.get_parameter(name))] == []
    check_layers(compiled, weights)
    assert nmcompile.verify(compiled).ok


@pytest.mark.parametrize("name", MODELS)
def test_with_example_inputs_every_pruned_operand_of_a_step_holds_its_pattern(name: str) -> None:
    model, x = made(name)
    weights = gemm_weights(model)
    compiled = nmcompile.compile(model, "training", args=(x,), inplace=True)
    checked = nmcompile.verify(compiled, step=lambda: train(compiled, x))
    assert checked.ok
    check_layers(compiled, weights)
    report = nmcompile.inspect(compiled)
    assert report.summary["uncounted_layers"] == 0
    for layer in report.layers:
        for row in layer.plan.rows:
            name = f"{layer.name} ({row.phase.value})"
            assert any((check.name, check.operand) == (name, row.operand) for check in checked.checks) == row.is_sparse


def test_gpt2_generates_what_its_plain_pruned_copy_does() -> None:
    model, x = made("gpt2")
    compiled: Any = nmcompile.compile(model.eval(), "weights")
    plain: Any = nmcompile.finalize(compiled)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    tokens = compiled.generate(x, **options)
    assert tokens.shape == (2, 12) and tokens.equal(plain.generate(x, **options))
    assert isinstance(compiled, transformers.GPT2LMHeadModel)
