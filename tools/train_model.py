"""Train the small Llama that ships inside Secateurs, and its kin for measuring, on public-domain novels.

    python tools/train_model.py --books DIR --output models/llama
    python tools/train_model.py --books DIR --output models/opt --architecture opt --tokens 3_276_800
    python tools/train_model.py --books DIR --output models/opt-longer --architecture opt
    python tools/train_model.py --books DIR --output models/llama-128 --width 128
    python tools/train_model.py --books DIR --output models/opt-wikitext --start models/opt --more valid.txt \
        --tokens 1_228_800

One file from raw text to a folder that transformers loads, on a GPU where there is one. Matrices are trained
by Muon, which on two CPU cores reaches in one hour what AdamW reaches in two; embeddings, norms and biases by
AdamW. The rate is constant, then falls linearly to zero over the last two fifths. Weights live in float32 and
are saved in bfloat16; the perplexity in the model card is that of the saved weights.
"""

import json
import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from secateurs.device import resolve_device

# Never trained on: the first is text to report on, the second to choose settings on.
HELD_OUT = ("Dracula_345.txt", "The-Adventures-of-Sherlock-Holmes_1661.txt")
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
BATCH, LENGTH = 8, 512


def train_tokenizer(books: list[Path]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(book) for book in books], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=LENGTH
    )


def build(architecture: Literal["llama", "opt"], width: int) -> PreTrainedModel:
    """At width 256, 5.5 M parameters as a Llama with grouped queries and 4.3 M as an OPT; heads of 32."""
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": width, "num_attention_heads": width // 32,
        "max_position_embeddings": LENGTH, "tie_word_embeddings": True, **special,
    }  # fmt: skip
    config = {
        "llama": lambda: LlamaConfig(
            intermediate_size=width * 11 // 4,
            num_hidden_layers=6,
            num_key_value_heads=width // 64,
            **shared,
        ),
        "opt": lambda: OPTConfig(
            ffn_dim=4 * width, num_hidden_layers=4, word_embed_proj_dim=width, dropout=0.0, **shared
        ),
    }[architecture]()
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def encode(tokenizer: PreTrainedTokenizerFast, book: Path) -> torch.Tensor:
    """(tokens,) of one book, with a marker at its end."""
    ids = tokenizer(book.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return torch.tensor([*ids, tokenizer.eos_token_id])


@torch.compile
def loss_of(model: PreTrainedModel, blocks: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, nats per token, of (batch, LENGTH + 1) ids."""
    with torch.autocast(blocks.device.type, torch.bfloat16):
        logits = model(blocks[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), blocks[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor, windows: int = 64) -> float:
    """Over the first `windows` non-overlapping windows of LENGTH tokens."""
    model.eval()
    blocks = tokens[: windows * LENGTH].view(-1, LENGTH).to(model.device)
    losses = [model(block[None], labels=block[None]).loss.item() for block in blocks]
    model.train()
    return math.exp(sum(losses) / len(losses))


def main(
    books: Path,
    output: Path,
    architecture: Literal["llama", "opt"] = "llama",
    width: int = 256,
    tokens: int = 9_830_400,
    start: Path | None = None,
    more: Path | None = None,
    muon_rate: float = 0.005,
    adam_rate: float = 0.004,
    seed: int = 0,
) -> None:
    """Train a model.

    Args:
        books: a folder of text files, of which `HELD_OUT` are left out.
        output: the folder to make.
        architecture: of a model trained from nothing.
        width: of the same.
        tokens: to train on.
        start: a model to go on from.
        more: a text from which every other sequence is taken.
        muon_rate: of matrices.
        adam_rate: of the rest.
        seed: of the weights and the order.
    """
    torch.manual_seed(seed)
    files = sorted(books.glob("*.txt"))
    train_files = [file for file in files if file.name not in HELD_OUT]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start) if start else train_tokenizer(train_files)
    text = torch.cat([encode(tokenizer, file) for file in train_files])
    other = encode(tokenizer, more) if more else text
    held_out = {name: encode(tokenizer, books / name) for name in HELD_OUT}
    model = (
        AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        if start
        else build(architecture, width)
    )
    torch.nn.Module.to(model, resolve_device(None))
    print(f"{model.num_parameters():,} parameters, {text.numel():,} tokens of text")

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers = [
        torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    steps = tokens // (BATCH * LENGTH)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))

    def window(source: torch.Tensor) -> torch.Tensor:
        offset = int(torch.randint(source.numel() - LENGTH - 1, ()))
        return source[offset : offset + LENGTH + 1]

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimisers]
    began = time.monotonic()
    for step in range(steps):
        blocks = torch.stack([window(source) for source in [text, other] * (BATCH // 2)])
        loss = loss_of(model, blocks.to(model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.monotonic() - began
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)

    model.bfloat16()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    record = {
        "architecture": model.config.model_type,
        "parameters": model.num_parameters(),
        "tokens": steps * BATCH * LENGTH,
        "seconds": round(time.monotonic() - began),
        "started_from": start.name if start else None,
        "trained_on": [file.name for file in (*train_files, *([more] if more else []))],
        "perplexity_held_out": {k: round(perplexity(model, v), 2) for k, v in held_out.items()},
    }
    print(json.dumps(record, indent=2))
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
