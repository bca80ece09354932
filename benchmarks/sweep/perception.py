"""Models of transformers for images, sound, time series, and several of them together."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.sweep.architecture import VOCABULARY, Architecture, Inputs, tokens
from benchmarks.sweep.language import SEQ2SEQ, WIDTHS, lm

VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {**WIDTHS, "max_position_embeddings": 16}
WAVES: dict[str, Any] = {
    **WIDTHS, "conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip


def pictures(size: int = 32, name: str = "pixel_values") -> Callable[[int], Inputs]:
    return lambda batch: ((), {name: torch.randn(batch, 3, size, size)})


def _pairs(batch: int) -> Inputs:
    return (), {"input_ids": tokens(batch), "pixel_values": torch.randn(batch, 3, 32, 32)}


def _waves(batch: int) -> Inputs:
    return (), {"input_values": torch.randn(batch, 400)}


def _spectrograms(batch: int) -> Inputs:
    return (), {"input_features": torch.randn(batch, 8, 32), "decoder_input_ids": tokens(batch)}


def _frames(batch: int) -> Inputs:
    return (), {"input_features": torch.randn(batch, 32, 8), "decoder_input_ids": tokens(batch)}


def _videos(batch: int) -> Inputs:
    return (), {"pixel_values": torch.randn(batch, 2, 3, 32, 32)}


def _series(batch: int) -> Inputs:
    return (), {"past_values": torch.randn(batch, 32, 2)}


PERCEPTION: tuple[Architecture, ...] = (
    lm("ViTForImageClassification", "ViTConfig", pictures(), **VISION),
    lm("BeitForImageClassification", "BeitConfig", pictures(), **VISION),
    lm("Dinov2ForImageClassification", "Dinov2Config", pictures(), **VISION),
    lm("ConvNextForImageClassification", "ConvNextConfig", pictures(64), depths=[1, 1], hidden_sizes=[16, 32],
       num_stages=2),
    lm("ResNetForImageClassification", "ResNetConfig", pictures(), embedding_size=16, hidden_sizes=[32, 64],
       depths=[1, 1], layer_type="basic"),
    lm("SegformerForSemanticSegmentation", "SegformerConfig", pictures(64), depths=[1, 1, 1, 1],
       hidden_sizes=[16, 32, 32, 64], num_attention_heads=[1, 2, 4, 4], decoder_hidden_size=32),
    lm("SwinForImageClassification", "SwinConfig", pictures(), image_size=32, patch_size=4, embed_dim=16,
       depths=[2, 2], num_heads=[2, 4], window_size=4),
    lm("MobileViTForImageClassification", "MobileViTConfig", pictures(64), image_size=64, hidden_sizes=[32, 48, 64],
       neck_hidden_sizes=[8, 16, 16, 24, 32, 32, 64], initializer_range=0.2),  # smaller ones fade to denormals
    lm("YolosForObjectDetection", "YolosConfig", pictures(), **{**VISION, "image_size": [32, 32]},
       num_detection_tokens=4),
    lm("TimesformerForVideoClassification", "TimesformerConfig", _videos, **VISION, num_frames=2),
    lm("CLIPModel", "CLIPConfig", _pairs, text_config=TEXT, vision_config=VISION, projection_dim=16),
    lm("SiglipModel", "SiglipConfig", _pairs, text_config=TEXT, vision_config=VISION),
    lm("ViltModel", "ViltConfig", _pairs, **{**VISION, **WIDTHS}),
    lm("Wav2Vec2ForCTC", "Wav2Vec2Config", _waves, **WAVES),
    lm("WavLMForCTC", "WavLMConfig", _waves, **WAVES),
    lm("WhisperForConditionalGeneration", "WhisperConfig", _spectrograms, **SEQ2SEQ, num_mel_bins=8,
       max_source_positions=16, max_target_positions=16),
    lm("Speech2TextForConditionalGeneration", "Speech2TextConfig", _frames, **SEQ2SEQ, input_feat_per_channel=8,
       input_channels=1, conv_channels=16, num_conv_layers=1, conv_kernel_sizes=(3,), max_source_positions=32,
       max_target_positions=32),
    lm("PatchTSTForPrediction", "PatchTSTConfig", _series, num_input_channels=2, context_length=32, patch_length=8,
       patch_stride=8, d_model=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, prediction_length=8),
    lm("PatchTSMixerForPrediction", "PatchTSMixerConfig", _series, num_input_channels=2, context_length=32,
       patch_length=8, patch_stride=8, d_model=32, num_layers=2, prediction_length=8),
    lm("PerceiverForSequenceClassification", "PerceiverConfig", lambda batch: ((), {"inputs": tokens(batch, 16)}),
       num_latents=8, d_latents=32, d_model=32, num_blocks=1, num_self_attends_per_block=2,
       num_self_attention_heads=4, num_cross_attention_heads=4, vocab_size=VOCABULARY, max_position_embeddings=16),
    lm("DecisionTransformerModel", "DecisionTransformerConfig", lambda batch: ((), {
        "states": torch.randn(batch, 4, 16), "actions": torch.randn(batch, 4, 4), "rewards": torch.randn(batch, 4, 1),
        "returns_to_go": torch.randn(batch, 4, 1), "timesteps": torch.arange(4).expand(batch, 4).clone(),
        "attention_mask": torch.ones(batch, 4)}),
       state_dim=16, act_dim=4, hidden_size=32, n_layer=2, n_head=4, max_ep_len=16, n_positions=32),
)  # fmt: skip
"""The models of images, sound, series and several of them."""
