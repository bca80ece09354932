"""Models as they come: permuted at random, they compute what they computed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile.capture import capture_model
from nmcompile.pruning.pattern import NMPattern
from tests.permutation.test_permutations import CONV_NETS, IMAGE, check, patterns_of, permute, randomize, sizes


def vision(name: str, **options: object) -> Callable[[], nn.Module]:
    models = pytest.importorskip("torchvision.models")
    return lambda: getattr(models, name)(**options)


def llama() -> nn.Module:
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, tie_word_embeddings=True,
    )  # fmt: skip
    model: nn.Module = hf.LlamaForCausalLM(config)
    return Logits(model, "logits")


def bert() -> nn.Module:
    hf = pytest.importorskip("transformers")
    config = hf.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    model: nn.Module = hf.BertModel(config)
    return Logits(model, "last_hidden_state")


class Logits(nn.Module):
    def __init__(self, model: nn.Module, field: str) -> None:
        super().__init__()
        self.model, self.field = model, field

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = getattr(self.model(tokens), self.field)
        return found


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet18", 12), ("densenet121", 120), ("mobilenet_v2", 25), ("convnext_tiny", 22), ("shufflenet_v2_x0_5", 80)],
)
def test_vision_models(name: str, count: int) -> None:
    found = check(vision(name)(), torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert len(found.families) == count


def test_a_vision_transformer() -> None:
    model = vision(
        "VisionTransformer", image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48
    )
    found = check(model(), torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert {32, 48} < set(sizes(found))


def test_llama() -> None:
    # Its norms and rotary embeddings compute in float32 whatever the dtype, so its sums are rounded there.
    found = check(llama(), torch.randint(50, (1, 6)), tolerance=1e-5)
    assert sizes(found) == [8, 8, 8, 8, 32, 48, 48]


def test_compile_keeps_what_permutations_found() -> None:
    model = randomize(CONV_NETS["residual"][0]()).float()
    image = IMAGE.float()
    captured = capture_model(model, (image,))
    patterns = patterns_of(captured, NMPattern(2, 4), False)
    before = model(image)
    found = permute(model, captured, patterns)
    torch.testing.assert_close(model(image), before, rtol=1e-4, atol=1e-4)
    compiled = nmcompile.compile(model, "weights")
    pruned = nmcompile.finalize(compiled)
    for name, change in found.report.items():
        weight = pruned.get_parameter(f"{name}.weight")
        assert float(weight.abs().sum()) in (
            pytest.approx(change.after, rel=1e-5),
            pytest.approx(change.total, rel=1e-5),  # the first and the last layer stay dense
        )


def test_bert() -> None:
    # It returns its hidden states; the insides of branches move, and the pooler's output, which is not returned.
    found = check(bert(), torch.randint(50, (1, 6)))
    assert sizes(found) == [8] * 16 + [32, 48, 48]
