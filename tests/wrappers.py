"""A tiny image-text model of each kind: a decoder and a vision tower in a wrapper, with random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

import families
from characters import characters

_TEXT: dict[str, Any] = {
    "vocab_size": families.VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING = {
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": families.WINDOW,
}
_LINEAR = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "depth": 1,
    "out_hidden_size": 64,
    "patch_size": 14,
    "num_position_embeddings": 64,
}
_QWEN = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 3)

WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**_TEXT, **_SLIDING, "query_pre_attn_scalar": 16},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": {
            **_TEXT,
            **_SLIDING,
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": families.VOCABULARY,
            "num_kv_shared_layers": 0,
        },
        "vision_config": {**_VISION, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
        "audio_config": None,
    },
    "llama4": {
        "text_config": {
            **_TEXT,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "intermediate_size": 48,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 16,
            "num_local_experts": 4,
            "moe_layers": [1],
        },
        "vision_config": {
            **_VISION,
            **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
        },
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model"},
    },
    "mistral3": {
        "text_config": {**_TEXT, "head_dim": 16, "model_type": "ministral3"},
        "vision_config": {**_VISION, "head_dim": 16, "model_type": "pixtral"},
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, **_SECTIONS},
        "vision_config": {**_QWEN_VISION, "window_size": 56, "fullatt_block_indexes": [0]},
        **_QWEN,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, **_SECTIONS, "head_dim": 16},
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
        **_QWEN,
    },
    "qwen3_vl_moe": {
        "text_config": {**_TEXT, **_SECTIONS, **_EXPERTS, "head_dim": 16},
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
        **_QWEN,
    },
    "qwen3_5": {"text_config": {**_TEXT, **_LINEAR}, "vision_config": _QWEN_VISION, **_QWEN},
    "qwen3_5_moe": {
        "text_config": {**_TEXT, **_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 48},
        "vision_config": _QWEN_VISION,
        **_QWEN,
    },
}


def build(name: str, dtype: torch.dtype = torch.float32, zeros: float = 0.0) -> PreTrainedModel:
    """The tiny model called `name` in WRAPPERS, of which a share of the matrices' weights is zero."""
    config = CONFIG_MAPPING[name](**WRAPPERS[name])
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (torch.rand(parameter.shape, generator=generator) >= zeros))
            else:
                parameter.add_(noise)
    return model.eval()


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32, zeros: float = 0.0) -> Path:
    """Write the model with a tokenizer to `folder`."""
    model = build(name, dtype, zeros)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    characters().save_pretrained(folder)
    return folder
