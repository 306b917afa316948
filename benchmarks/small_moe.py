"""A small mixture of experts, trained on novels: what figures about experts are measured on.

A Qwen3-MoE of 9.5 M parameters: 4 blocks of width 192, each with 16 experts of 224 channels of which 4 see a
token, and the bundled model's tokenizer. Matrices, each expert's by itself, are trained by Muon, the rest by
AdamW, with transformers' auxiliary loss for an even load; the rate follows a cosine. 800,000 tokens take
seven minutes of a core.
"""

import math
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import secateurs.demo as demo
from secateurs.text import evaluation_tokens

BATCH, LENGTH, STEPS, WARM_UP = 8, 256, 400, 40
MUON_RATE, ADAM_RATE = 0.005, 0.004


def small_moe(folder: Path, books: Path, without: set[str], seed: int = 0) -> Path:
    """The folder, made if it is not there.

    Args:
        books: a folder of .txt files.
        without: names of those that are not trained on.
    """
    if (folder / "config.json").exists():
        return folder
    files = [file for file in sorted(books.glob("*.txt")) if file.name not in without]
    if not files:
        raise SystemExit(f"{books} has no .txt files to train on")
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(Path(demo.__file__).parent / "model")
    text = torch.cat([evaluation_tokens(file, tokenizer) for file in files])
    model = build(len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {text.numel():,} tokens in {len(files)} files", flush=True)
    train(model, text)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build(vocabulary: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=224,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def train(model: Qwen3MoeForCausalLM, text: torch.Tensor) -> None:
    """On random windows of a text, (tokens,)."""
    named = list(model.named_parameters())
    stacked = [parameter for _, parameter in named if parameter.ndim == 3]
    # Muon is for matrices: each expert's is a view of the parameter that holds them all.
    views = [[torch.nn.Parameter(matrix) for matrix in parameter.data] for parameter in stacked]
    matrices = [p for name, p in named if p.ndim == 2 and "proj" in name]
    rest = [p for name, p in named if p.ndim < 3 and not (p.ndim == 2 and "proj" in name)]
    optimisers = [
        torch.optim.Muon(
            [*matrices, *(view for own in views for view in own)],
            lr=MUON_RATE,
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / STEPS)) / 2)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, rate) for optimiser in optimisers]
    start = time.monotonic()
    for step in range(STEPS):
        offsets = torch.randint(text.numel() - LENGTH, (BATCH,)).tolist()
        ids = torch.stack([text[offset : offset + LENGTH] for offset in offsets])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for parameter, own in zip(stacked, views, strict=True):
            assert parameter.grad is not None
            for view, grad in zip(own, parameter.grad, strict=True):
                view.grad = grad
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
        model.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            print(
                f"step {step}/{STEPS}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True
            )
