"""Small models with experts, some in blocks of other kinds, with zeros wherever the weights are matrices."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DeepseekV32Config,
    GptOssConfig,
    HYV3Config,
    JetMoeConfig,
    Llama4TextConfig,
    LongcatFlashConfig,
    MixtralConfig,
    NemotronHConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
_SMALL = {**_SIZES, "moe_intermediate_size": 72}

CONFIGS: dict[str, PreTrainedConfig] = {
    # Stored expert by expert, under other names.
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=5),
    # Expert by expert, in the second block only.
    "qwen3_moe": Qwen3MoeConfig(**_SMALL, num_experts=12, mlp_only_layers=[0]),
    # Fused, inputs before outputs, gate and up in turns, with biases.
    "gpt_oss": GptOssConfig(**_SIZES, num_local_experts=4),
    # No gate; all names begin with other words; blocks of one part.
    "nemotron_h": NemotronHConfig(
        **{**_SMALL, "num_hidden_layers": 3},
        layers_block_type=["mamba", "attention", "moe"],
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        moe_shared_expert_intermediate_size=72,
    ),
    # Dense layers under other names.
    "hy_v3": HYV3Config(**_SMALL, num_experts=4, first_k_dense_replace=1),
    # Asks a linear layer for its weight's dtype.
    "deepseek_v32": DeepseekV32Config(
        **{**_SMALL, "num_key_value_heads": 4},
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        index_topk=8,
        index_head_dim=16,
        index_n_heads=4,
        layer_types=["indexed_attention"] * 2,
    ),
    # In one parameter of two dimensions, with down inputs first.
    "dbrx": DbrxConfig(
        vocab_size=320,
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    # Inputs before outputs, all given all tokens at once; in the second block only.
    "llama4_text": Llama4TextConfig(
        **_SIZES,
        intermediate_size_mlp=96,
        num_local_experts=4,
        moe_layers=[1],
        attention_chunk_size=16,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    # Some experts compute nothing, and one parameter has room for these too.
    "longcat_flash": LongcatFlashConfig(
        **{**_SIZES, "num_key_value_heads": 4, "head_dim": 8},
        num_layers=1,
        ffn_hidden_size=96,
        expert_ffn_hidden_size=72,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    # A module for the experts of one product; attention has experts as well.
    "jetmoe": JetMoeConfig(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    ),
}
"""The last four are not called through transformers' interface for experts."""

EXPERTS = {
    "mixtral": 4 * 5,
    "qwen3_moe": 2 * 12,
    "gpt_oss": 4 * 4,
    **dict.fromkeys(("nemotron_h", "hy_v3", "deepseek_v32", "llama4_text"), 2 * 4),
    "dbrx": 6 * 4,
    "longcat_flash": 6 + 4,
    "jetmoe": 8 * 4,
}
"""Matrices of experts in each."""


def pruned(
    config: PreTrainedConfig, *, only: str = "", sparsity: float = 0.7, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random model with zeros, a few of them negative.

    Args:
        config: of CONFIGS, say.
        only: in parameters whose names have this in them.
        sparsity: of these.
        dtype: of all.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(0.2 * torch.randn(tensor.shape) + (tensor.dim() < 2))
        if tensor.dim() > 1 and only in name and not any(word in name for word in ("embed", "wte", "head")):
            tensor[torch.rand(tensor.shape) < sparsity] = 0
            tensor[..., :2, :2] = -0.0
    return model
