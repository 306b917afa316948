"""A tiny model of every supported family, built by transformers, with weights at which every part matters.

Sliding windows are shorter than the text of `tokens`, so that the masks of the layers differ.
"""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 128
WINDOW = 8

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 80}

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "llama-bias": LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "qwen2": Qwen2Config(
        **_GROUPED,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": Qwen3Config(
        **_GROUPED, head_dim=16, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "gemma2": Gemma2Config(**_GROUPED, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW),
    "phi3": Phi3Config(**_GROUPED, sliding_window=WINDOW),
    "opt": OPTConfig(**_COMMON, ffn_dim=96),
    "opt-350m": OPTConfig(**_COMMON, ffn_dim=96, do_layer_norm_before=False, word_embed_proj_dim=32),
    "gpt2": GPT2Config(**_COMMON),
    "gpt_neox": GPTNeoXConfig(**_COMMON, intermediate_size=96),
    "gpt_neox-sequential": GPTNeoXConfig(**_COMMON, intermediate_size=96, use_parallel_residual=False),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The tiny model called `name` in FAMILIES, in evaluation mode."""
    # A model writes into its configuration.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[name]), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            # Norms keep the mean that transformers gave them (0 in Gemma, 1 elsewhere).
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model.eval()


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random text (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)
