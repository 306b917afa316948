"""Models, blocks and tokens at random: speed and memory do not depend on what the weights say."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from secateurs.runtime.format import pack, row_offsets
from secateurs.runtime.layout import Layout
from secateurs.values import Values

VOCABULARY = 32000  # Llama's


def random_llama(folder: Path, layers: int, dtype: str, *, width: int = 512, channels: int = 1376) -> Path:
    """A saved Llama with heads of 64 and no tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def random_experts(folder: Path, vocabulary: int = VOCABULARY, **shape: int) -> Path:
    """A saved random bfloat16 Qwen3-MoE of two blocks of width 512 with 8 experts of 384 channels, of which 2
    see a token, but for what `shape` says of its configuration. No tokenizer."""
    torch.manual_seed(0)
    small = {
        "hidden_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 384,
    }
    config = Qwen3MoeConfig(vocab_size=vocabulary, **(small | shape))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def block_of_experts(folder: Path, vocabulary: int) -> Path:
    """One block like those of Qwen3-30B-A3B: width 2048, 32 query and 4 key-value heads of 128, 128 experts
    of 768 channels of which 8 see a token."""
    return random_experts(
        folder,
        vocabulary,
        hidden_size=2048,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    )


def random_ids(samples: int, length: int, vocabulary: int = VOCABULARY) -> Tensor:
    """Calibration ids (samples, length)."""
    return torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))


def random_tokens(file: Path, samples: int, length: int, vocabulary: int = VOCABULARY) -> Path:
    """The same in a file, for a run in a process of its own."""
    save_file({"ids": random_ids(samples, length, vocabulary)}, file)
    return file


def prune_by_magnitude(model: LlamaForCausalLM, sparsity: float) -> None:
    """Zeroes the smallest weights of the blocks; they are as normal as they were initialised."""
    threshold = model.config.initializer_range * math.sqrt(2) * float(torch.erfinv(torch.tensor(sparsity)))
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data[layer.weight.data.abs() < threshold] = 0


def round_to_nearest(
    model: LlamaForCausalLM, values: Values, embedding: Values | None = None
) -> dict[str, tuple[Values, Tensor]]:
    """Rounds the weights of the blocks that are left, and perhaps the embedding's, with the scale at which
    each group's largest is the highest level; gives what `write_scales` takes."""
    scales = {}
    for name, weight in model.named_parameters():
        grid = embedding if name == "model.embed_tokens.weight" else values
        if grid is None or weight.dim() == 1 or name == "lm_head.weight":
            continue
        largest = weight.data.unflatten(1, (-1, grid.group)).abs().amax(2)
        scale = (largest.float() / grid.highest).bfloat16()
        rounded = grid.decode(grid.encode(weight.data, scale), scale) * (weight.data != 0)
        weight.data = rounded.to(weight.dtype)
        scales[name] = (grid, scale)
    return scales


def block_shapes(width: int, mlp: int) -> list[tuple[int, int]]:
    """(rows, columns) of q, k, v, o, gate, up and down."""
    return [(width, width)] * 4 + [(mlp, width)] * 2 + [(width, mlp)]


def sparse_weight(
    shape: tuple[int, int], sparsity: float, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Normal, with zeros anywhere."""
    weight = torch.randn(shape, dtype=dtype, device=device)
    return weight.masked_fill_(torch.rand(shape, device=device) < sparsity, 0)


def packed_weight(weight: Tensor) -> tuple[Tensor, Tensor, Layout]:
    """Packed, with its rows' offsets, on the weight's device."""
    data, layout = pack(weight)
    offsets = row_offsets("weight", data, layout)
    return data.to(weight.device), offsets.to(weight.device), layout


def large_llama(folder: Path, blocks: int, width: int, mlp: int, heads: int, device: torch.device) -> Path:
    """A saved bfloat16 Llama whose weights are never in memory together: a file for each block."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    names = [f"{'self_attn' if len(role) == 1 else 'mlp'}.{role}_proj" for role in roles]
    inside: dict[str, tuple[int, ...]] = dict(zip(names, block_shapes(width, mlp), strict=True))
    inside |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    outside: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, width),
        "lm_head.weight": (VOCABULARY, width),
        "model.norm.weight": (width,),
    }
    files = [
        outside,
        *(
            {f"model.layers.{index}.{name}.weight": shape for name, shape in inside.items()}
            for index in range(blocks)
        ),
    ]
    torch.manual_seed(0)
    weight_map = {}
    for number, tensors in enumerate(files):
        file = f"model-{number:05}.safetensors"
        made = {name: _initial(shape, device) for name, shape in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _initial(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Of a matrix; the scale of a norm is 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(0.02).cpu()
