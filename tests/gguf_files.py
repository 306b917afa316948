"""Tiny .gguf files as llama.cpp's converter writes them, with the `gguf` package's writer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ("<unk>", "<s>", "</s>")
MERGES = ("t h", "th e", "Ġ the")
TOKENS = (*SPECIAL, *bytes_to_unicode().values(), "th", "the", "Ġthe")
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"

CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    tie_word_embeddings=False,
)


def llama(**changes: Any) -> LlamaForCausalLM:
    """A tiny model with weights at which every part matters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG.to_dict(), **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape)
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model.eval()


def write(
    file: Path,
    model: LlamaForCausalLM,
    kind: str = "F32",
    *,
    architecture: str = "llama",
    metadata: Mapping[str, Any] = {},
    tensors: Mapping[str, Tensor] = {},
    without: str | None = None,
) -> Path:
    """Write a Llama; its matrices become what they are read as.

    Args:
        file: where to.
        model: gets the weights that its matrices have once they are quantised.
        kind: of its matrices, by ggml's name.
        architecture: what the file says that it is.
        metadata: more of it; numbers and strings.
        tensors: more of them.
        without: a tensor that is left out.
    """
    config: Any = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    for key, value in metadata.items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        called = names.get_name(name.removesuffix(".weight")) + ".weight"
        if called != without:
            _add(writer, called, parameter, kind if parameter.dim() > 1 else "F32", _heads(name, config))
    for name, tensor in tensors.items():
        _add(writer, name, tensor, "F32", None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _heads(name: str, config: LlamaConfig) -> int | None:
    """How many heads the rows of a matrix are of, if llama.cpp permutes them."""
    if "q_proj" in name:
        return config.num_attention_heads
    return config.num_key_value_heads if "k_proj" in name else None


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: str, heads: int | None) -> None:
    quantised = gguf.GGMLQuantizationType[kind]
    blocks = gguf.quantize(tensor.detach().numpy(), quantised)
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(gguf.dequantize(blocks, quantised).reshape(tensor.shape)))
    if heads is not None:  # the two halves of each head's rows in turns, as convert_hf_to_gguf.py has it
        blocks = blocks.reshape(heads, 2, -1, blocks.shape[-1]).swapaxes(1, 2).reshape(blocks.shape)
    writer.add_tensor(name, blocks, raw_dtype=quantised)
