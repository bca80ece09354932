"""Models of torchvision, timm and transformers at their smallest: trained for a step, finalized, deployed, exported.

For each model, "dense" equals eager, the finalized model equals the compiled one, and a compilation with `args` keeps
the masks of one without.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers as hf
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import nmcompile

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
BERT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


class SelfAttention(nn.MultiheadAttention):
    """A wrapper that hides that query, key and value are one tensor."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        output: Tensor = super().forward(x, x, x, need_weights=False)[0]
        return output


def images(size: int) -> tuple[Tensor]:
    return (torch.randn(2, 3, size, size),)


def tokens(model: str, config: str, **sizes: Any) -> Callable[[], Built]:
    return lambda: (getattr(hf, model)(getattr(hf, config)(**sizes)), (), {"input_ids": IDS})


def pictures(name: str, size: int = 64, **sizes: Any) -> Callable[[], Built]:
    return lambda: (timm.create_model(name, num_classes=10, **sizes), images(size), {})


def heads_for_training(name: str, size: int) -> Callable[[], Built]:
    make = getattr(torchvision.models, name)
    return lambda: (make(weights=None, init_weights=False, num_classes=10), images(size), {})


def clip() -> Built:
    vision = {**VISION, "image_size": 32, "patch_size": 16}
    config = hf.CLIPConfig(text_config={**BERT, "max_position_embeddings": 16}, vision_config=vision, projection_dim=16)
    inputs = {"input_ids": IDS, "pixel_values": images(32)[0], "attention_mask": torch.ones_like(IDS)}
    return hf.CLIPModel(config), (), inputs


def t5() -> Built:
    config = hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return hf.T5ForConditionalGeneration(config), (), {"input_ids": IDS, "decoder_input_ids": IDS}


def bart() -> Built:
    config = hf.BartConfig(**DECODER, max_position_embeddings=32)
    return hf.BartForConditionalGeneration(config), (), {"input_ids": IDS, "decoder_input_ids": IDS}


def whisper() -> Built:
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(**DECODER, **special, num_mel_bins=8, max_source_positions=16, max_target_positions=16)
    inputs = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": IDS}
    return hf.WhisperForConditionalGeneration(config), (), inputs


MODELS: dict[str, Callable[[], Built]] = {
    "clip": clip,
    "xcit": pictures("xcit_nano_12_p16_224", img_size=64),
    "encoder-decoder": lambda: (
        nn.Transformer(32, 4, 1, 1, 64, batch_first=True),
        (torch.randn(2, 5, 32), torch.randn(2, 5, 32)),
        {},
    ),
    "attention of its own": lambda: (
        nn.Sequential(nn.Linear(32, 32), SelfAttention(32, 4, batch_first=True), nn.Linear(32, 8)),
        (torch.randn(4, 5, 32),),
        {},
    ),
    "mamba": tokens(
        "MambaForCausalLM", "MambaConfig", vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4,
        time_step_rank=8, use_cache=False,
    ),
    "falcon": tokens(
        "FalconForCausalLM", "FalconConfig", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        use_cache=False,
    ),
    "bert": tokens("BertForSequenceClassification", "BertConfig", **BERT),
    "roberta": tokens("RobertaForSequenceClassification", "RobertaConfig", **BERT),
    "electra": tokens("ElectraForSequenceClassification", "ElectraConfig", **BERT, embedding_size=32),
    "albert": tokens("AlbertForSequenceClassification", "AlbertConfig", **BERT, embedding_size=32),
    "deberta": tokens(
        "DebertaForSequenceClassification", "DebertaConfig", **BERT, relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    ),
    "deberta v2": tokens("DebertaV2ForSequenceClassification", "DebertaV2Config", **BERT),
    "rwkv": tokens(
        "RwkvForCausalLM", "RwkvConfig", vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32,
        intermediate_size=64, use_cache=False,
    ),
    "coatnet": pictures("coatnet_pico_rw_224", img_size=64),
    "ghostnet": pictures("ghostnet_050"),
    "mobilevit": pictures("mobilevit_xxs"),
    "skresnet": pictures("skresnet18"),
    "googlenet": heads_for_training("googlenet", 64),
    "inception": heads_for_training("inception_v3", 299),
    "llama": tokens("LlamaForCausalLM", "LlamaConfig", **BERT, num_key_value_heads=2),
    "t5": t5,
    "bart": bart,
    "whisper": whisper,
}  # fmt: skip


def floats(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def run(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    np.random.seed(1)
    return floats(model(*args, **kwargs))


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative L2 difference."""
    return max(float((a - b).norm() / (b.norm() + 1e-12)) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_from_training_to_files(name: str, tmp_path: Path) -> None:
    model, args, kwargs = MODELS[name]()
    model.eval()
    with torch.no_grad():
        eager = run(model, args, kwargs)
        dense = nmcompile.compile(model, "dense", args=args, kwargs=kwargs).eval()
        # In eval mode torch's own encoder sums in another order.
        assert distance(run(dense, args, kwargs), eager) <= (1e-6 if name == "encoder-decoder" else 0)
    sparse = nmcompile.compile(model, "training").train()
    torch.stack([output.square().mean() for output in run(sparse, args, kwargs)]).sum().backward()
    torch.optim.SGD(sparse.parameters(), 1e-3).step()
    sparse.eval()
    with torch.no_grad():
        trained, final = run(sparse, args, kwargs), nmcompile.finalize(sparse).eval()
        assert nmcompile.verify(final).ok
        assert distance(run(final, args, kwargs), trained) <= 1e-6
        deployed = nmcompile.compile(sparse, "weights", args=args, kwargs=kwargs).eval()
        assert distance(run(deployed, args, kwargs), trained) <= 1e-6
    nmcompile.export(deployed, tmp_path / "weights.onnx", args, kwargs=kwargs)
    batch = kwargs or (args,)
    small = nmcompile.compile(sparse, "inference", args=args, kwargs=kwargs, calibration=[batch]).eval()
    nmcompile.export(small, tmp_path / "inference.onnx", args, kwargs=kwargs)
    assert nmcompile.verify(tmp_path / "inference.onnx").ok
