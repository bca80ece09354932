"""Language models of transformers: two layers of width 32."""

from collections.abc import Callable
from typing import Any

import transformers as hf
from torch import nn

from benchmarks.sweep.architecture import VOCABULARY, Architecture, Inputs, tokens

WIDTHS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CAUSAL: dict[str, Any] = {**WIDTHS, **SPECIAL, "use_cache": False, "max_position_embeddings": 32}
GROUPED: dict[str, Any] = {**CAUSAL, "num_key_value_heads": 2}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "use_cache": False,
    "decoder_start_token_id": 1, **SPECIAL,
}  # fmt: skip


def built(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    """Return what makes a model of transformers from a config, both by the names of their classes."""

    def make() -> nn.Module:
        model_class, config_class = getattr(hf, model), getattr(hf, config)
        result: nn.Module = model_class(config_class(**sizes))
        return result

    return make


def only_tokens(batch: int) -> Inputs:
    return (), {"input_ids": tokens(batch)}


def both_sides(batch: int) -> Inputs:
    return (), {"input_ids": tokens(batch), "decoder_input_ids": tokens(batch, 7)}


def lm(model: str, config: str, inputs: Callable[[int], Inputs] = only_tokens, **sizes: Any) -> Architecture:
    """Return an architecture of transformers; it has its config's name."""
    return Architecture(config.removesuffix("Config"), "transformers", built(model, config, **sizes), inputs)


def _long(batch: int) -> Inputs:
    return (), {"input_ids": tokens(batch, 16)}


LANGUAGE = (
    lm("BertForSequenceClassification", "BertConfig", **WIDTHS),
    lm("DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4,
       hidden_dim=64),
    lm("AlbertForSequenceClassification", "AlbertConfig", **WIDTHS, embedding_size=16),
    lm("DebertaForSequenceClassification", "DebertaConfig", **WIDTHS, relative_attention=True,
       pos_att_type=["c2p", "p2c"]),
    lm("DebertaV2ForSequenceClassification", "DebertaV2Config", **WIDTHS, relative_attention=True,
       pos_att_type=["c2p", "p2c"]),
    lm("ModernBertForSequenceClassification", "ModernBertConfig", **WIDTHS, **SPECIAL, cls_token_id=1, sep_token_id=2),
    lm("ConvBertForSequenceClassification", "ConvBertConfig", **WIDTHS, embedding_size=32),
    lm("MobileBertForSequenceClassification", "MobileBertConfig", **WIDTHS, embedding_size=16,
       intra_bottleneck_size=32, true_hidden_size=32),
    lm("FNetForSequenceClassification", "FNetConfig", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2,
       intermediate_size=64),
    lm("XLNetForSequenceClassification", "XLNetConfig", vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4,
       d_inner=64),
    lm("FunnelForSequenceClassification", "FunnelConfig", vocab_size=VOCABULARY, block_sizes=[1, 1], d_model=32,
       n_head=4, d_head=8, d_inner=64, num_decoder_layers=1),
    lm("LongformerForSequenceClassification", "LongformerConfig", _long, **WIDTHS, attention_window=4,
       max_position_embeddings=64),
    lm("BigBirdForSequenceClassification", "BigBirdConfig", **WIDTHS, attention_type="original_full"),
    lm("EsmForSequenceClassification", "EsmConfig", **WIDTHS, pad_token_id=0, mask_token_id=1,
       max_position_embeddings=32),
    lm("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32,
       use_cache=False),
    lm("OPTForCausalLM", "OPTConfig", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, ffn_dim=64,
       num_attention_heads=4, word_embed_proj_dim=32, use_cache=False, **SPECIAL),
    lm("BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, use_cache=False,
       **SPECIAL),
    lm("FalconForCausalLM", "FalconConfig", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2,
       num_attention_heads=4, use_cache=False, **SPECIAL),
    lm("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    lm("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8),
    lm("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=8),
    lm("PhiForCausalLM", "PhiConfig", **CAUSAL),
    lm("Phi3ForCausalLM", "Phi3Config", **GROUPED),
    lm("Starcoder2ForCausalLM", "Starcoder2Config", **GROUPED),
    lm("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4),
    lm("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2,
       moe_intermediate_size=32, decoder_sparse_step=1),
    lm("DeepseekV3ForCausalLM", "DeepseekV3Config", **{**CAUSAL, "num_key_value_heads": 4}, n_routed_experts=4,
       num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1,
       q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8),
    lm("GraniteMoeForCausalLM", "GraniteMoeConfig", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    lm("GptOssForCausalLM", "GptOssConfig", **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    lm("MambaForCausalLM", "MambaConfig", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4,
       time_step_rank=8, use_cache=False),
    lm("Mamba2ForCausalLM", "Mamba2Config", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8,
       num_heads=4, head_dim=16, n_groups=1, chunk_size=4, use_cache=False, **SPECIAL),
    lm("JambaForCausalLM", "JambaConfig", **GROUPED, num_experts=2, attn_layer_period=2, attn_layer_offset=1,
       expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False),
    lm("RwkvForCausalLM", "RwkvConfig", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2,
       attention_hidden_size=32, intermediate_size=64, use_cache=False),
    lm("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", **GROUPED, lru_width=32, attention_window_size=8,
       block_types=["recurrent", "attention"]),
    lm("T5ForConditionalGeneration", "T5Config", both_sides, vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64,
       num_layers=2, num_heads=4, use_cache=False),
    lm("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", both_sides, vocab_size=VOCABULARY,
       d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, num_experts=4, num_sparse_encoder_layers=1,
       num_sparse_decoder_layers=1, use_cache=False),
    lm("BartForConditionalGeneration", "BartConfig", both_sides, **SEQ2SEQ, max_position_embeddings=32),
)  # fmt: skip
"""The language models."""
