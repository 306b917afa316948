"""Small pruned weights and models, for the tests of the runtime."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "opt": OPTConfig(
        vocab_size=320,
        hidden_size=64,
        ffn_dim=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(
        vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "phi3": Phi3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=0,
    ),
    "neox": GPTNeoXConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


def sparse(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A random weight with about that share of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    return weight.to(dtype)


def pruned(family: str, sparsity: float = 0.7, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A random model with zeros, a few of them negative, in all of its linear layers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=dtype).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.weight.data[torch.rand(module.weight.shape) < sparsity] = 0
            module.weight.data[:2, :2] = -0.0
    return model


def save(model: PreTrainedModel, folder: Path, **settings: object) -> Path:
    model.save_pretrained(folder, **settings)
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(40).view(2, 20) * 7 % 320
    with torch.no_grad():
        return model(ids).logits
