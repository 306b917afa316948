"""A tiny random model of every text decoder that transformers knows, and of image-text models around them.

The table is short because most configurations use the same words: `SIZES` says what each word is, a
configuration takes those that it knows, and `PARTICULAR` says the rest. Every kind of layer that a model
can have is in it: sliding and full attention, linear attention, Mamba, convolutions, dense MLPs and experts.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from characters import characters

VOCABULARY = 128
WINDOW = 8
POSITIONS = 128

ELSEWHERE = (
    *("MASKED_LM", "MULTIPLE_CHOICE"),  # encoders, which can be told to look back only
    *("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "TEXT_TO_WAVEFORM"),  # decoders that listen to an encoder
    *("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"),  # wrappers around a decoder that has a line of its own
)
"""Of transformers' tables of models by task: a type of model that is in one of these is no text decoder."""

NO_DECODERS = {
    "bert-generation": "an encoder (is_decoder is False by default)",
    "trocr": "the decoder of an image encoder, whose states it cannot do without",
    "moshi": "speaks and listens: its decoder reads and writes audio codes",
    "gemma4_assistant": "drafts tokens for a Gemma 4, whose hidden states and keys it reads",
    "gemma4_unified_assistant": "drafts tokens for a Gemma 4, whose hidden states and keys it reads",
}
"""What the rule does not see."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Factors, none of them 1.
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.125,
    "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
    "logit_scale": 0.5,
    # Depth and width.
    "hidden_size": 64,
    **dict.fromkeys(("num_hidden_layers", "num_layers"), 2),
    **dict.fromkeys(("intermediate_size", "dense_intermediate_size"), 96),
    **dict.fromkeys(("ffn_dim", "dim_ff", "dff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 16),
    "vocab_size_per_layer_input": VOCABULARY,
    "layer_types": ["sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    # Attention.
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "global_head_dim", "dim_head", "query_pre_attn_scalar"), 16),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), WINDOW
    ),
    "use_sliding_window": True,
    "rotary_dim": 8,
    # Latent attention, and what chooses the tokens that it looks at.
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 4,
    # Linear attention.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # Mamba.
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 8,
    "use_mamba_kernels": False,
    "time_step_rank": 8,
    "state_size": 8,
    # Experts: 4, of which a token takes 2.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    "shared_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "expert_ffn_hidden_size": 48,
    "first_k_dense_replace": 1,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
}
"""What a word of a configuration is, in every one that knows it."""

_LATENT = {"num_key_value_heads": 4}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_INDEXED = {**_LATENT, "layer_types": ["indexed_attention"] * 2}
_SHARING = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}

PARTICULAR: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _INDEXED,
    "bailing_hybrid": {**_LATENT, **_LINEAR},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "vocab_size": 260,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 64,
        "local_attention_window_len": WINDOW,
        **{
            f"{part}_config": {
                "hidden_size": 64,
                "hidden_size_global": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 96,
            }
            for part in ("patcher", "encoder", "decoder", "global")
        },
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_LATENT, "topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _INDEXED,
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "layer_types": [
            *("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"),
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8},
        "o_groups": 2,
        "o_lora_rank": 16,
        "hc_mult": 2,
    },
    "dots3_note_text": {
        **_LATENT,
        "layer_types": ["indexed_attention", "sliding_attention"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    "falcon+new": {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
    "falcon+old": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {
        **_SHARING,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "altup_num_inputs": 2,
    },
    "gemma4": {"audio_config": None},
    "gemma4_text": {**_SHARING, "global_head_dim": 24},
    "gemma4_text+moe": {
        "global_head_dim": 24,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
    },
    "gemma4_unified_text": {**_SHARING, "global_head_dim": 24},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": {**_INDEXED, "indexer_types": ["full", "shared"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "granitemoehybrid": _LINEAR,
    "hy_v4": {**_INDEXED, "indexer_types": ["full", "shared"]},
    "inkling2_text": {
        "layer_types": ["hybrid_sliding", "hybrid"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
    },
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "logits_mup_width_multiplier": 2.0,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "jetmoe": {"kv_channels": 16, "num_key_value_heads": 2},
    "kimi_linear": {**_LATENT, **_LINEAR, "linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]},
    "llama4_text": {
        "intermediate_size": 48,
        "intermediate_size_mlp": 96,
        "moe_layers": [1],
        "attention_chunk_size": 16,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
    "longcat_flash": {**_LATENT, "head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 1, "chunk_size": 16},
    "minicpm3": {**_LATENT, "scale_emb": 2, "dim_model_base": 32},
    "minimax": _LINEAR,
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "modernbert-decoder": {"local_attention": 2 * WINDOW},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "olmo_hybrid": _LINEAR,
    "qwen2_5_vl_text": _SECTIONS,
    "qwen3_5_moe_text": {**_LINEAR, **_SECTIONS},
    "qwen3_5_text": {**_LINEAR, **_SECTIONS},
    "qwen3_next": _LINEAR,
    "qwen3_vl_moe_text": _SECTIONS,
    "qwen3_vl_text": _SECTIONS,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 64,
        "ngram_vocab_size_base": 64,
        "heads_per_ngram": 2,
        "split_ngram_parts": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64},
    "xglm": {"d_model": 64, "attention_heads": 4},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "youtu": {**_LATENT, "pad_token_id": None},  # loading sets the padding token's embedding to 0
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "adapter_rank": 8,
        "chunk_size": 16,
    },
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "num_experts_per_tok": 1, "router_hidden_size": 64},
}
"""What a type of model needs beside `SIZES`, or instead. Some types have a second entry: "type+variant"."""

WRAPPERS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "llava": "llama",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
}
"""Image-text models -> the type of the decoder inside."""

SEEING = {"gemma3": "siglip_vision_model", "llava": "clip_vision_model", "mistral3": "pixtral"}
"""The type of the part that sees, where a wrapper takes any."""

VISION: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
    **dict.fromkeys(("head_dim", "global_head_dim"), 16),
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "image_size": 28,
    "patch_size": 14,
    "window_size": 56,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
}
"""Like `SIZES`, for the part that sees."""

IMAGE_TOKENS = {
    "image_token_id": 3,
    "video_token_id": 4,
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
}


def text_decoders() -> list[str]:
    """Types of all text decoders that transformers knows."""
    elsewhere = {
        name for task in ELSEWHERE for name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    }
    known = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return [name for name in known if name not in elsewhere and name not in NO_DECODERS]


NAMES = sorted([*text_decoders(), *(name for name in PARTICULAR if "+" in name), *WRAPPERS])
"""What can be built here."""


def config_of(name: str) -> PretrainedConfig:
    """The configuration of a tiny model."""
    kind = CONFIG_MAPPING[name.partition("+")[0]]
    if name not in WRAPPERS:
        return kind(**{**_taken(kind, SIZES), **PARTICULAR.get(name, {})})
    vision = CONFIG_MAPPING[SEEING[name]] if name in SEEING else kind.sub_configs["vision_config"]
    return kind(
        text_config=config_of(WRAPPERS[name]).to_dict(),
        vision_config=vision(**_taken(vision, VISION)).to_dict(),
        **_taken(kind, IMAGE_TOKENS),
        **PARTICULAR.get(name, {}),
    )


def _taken(kind: type[PretrainedConfig], settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that a class of configurations knows, by the names that it knows them by."""
    fields, names = {field.name for field in dataclasses.fields(kind)}, kind.attribute_map
    known = {name: name if name in fields else names.get(name, name) for name in settings}
    return {known[name]: value for name, value in settings.items() if known[name] in fields}


def sampled(sample: Collection[str], without: Collection[str] = ()) -> list[Any]:
    """All but some names as a test's parameters; those that are not in the sample are slow."""
    return [
        name if name in sample else pytest.param(name, marks=pytest.mark.slow)
        for name in NAMES
        if name not in without
    ]


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The tiny model of a type, in evaluation mode."""
    config = config_of(name)
    auto: Any = AutoModelForImageTextToText if name in WRAPPERS else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # transformers draws some vectors at random, as time steps of Mamba
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.15 * torch.randn(parameter.shape, generator=generator)
            # Norms keep the mean that transformers gave them (0 in Gemma, 1 elsewhere).
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
        stored = model.state_dict().keys()
        for buffer in (buffer for name, buffer in model.named_buffers() if name in stored):
            if not buffer.is_floating_point():
                if not buffer.any():  # which experts a token goes to, by its id
                    buffer.random_(0, SIZES["num_experts"], generator=generator)
                continue
            noise = 0.15 * torch.randn(buffer.shape, generator=generator)
            # What masks by zeros goes on masking; what training has yet to set is set.
            buffer.copy_(buffer * (1 + noise) if buffer.any() else noise)
    return model.eval()


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random text (batch, length), without the tokens that stand for images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCABULARY, (batch, length), generator=generator)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the tiny model with a tokenizer to `folder`."""
    model = build(name, dtype)
    model.generation_config = GenerationConfig(max_new_tokens=7, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    characters().save_pretrained(folder)
    return folder
