"""Tokens per second of a whole model on the CPU, dense and compressed, over sparsity.

A Llama with random weights, pruned by magnitude, written, compressed and loaded as a user would; speed does
not depend on what the weights say. Each model is measured in a process of its own by `secateurs bench`, the
dense one anew beside each compressed one.

    python benchmarks/generate_cpu.py
"""

import argparse
import dataclasses
import math
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import RESULTS, Record, environment, save
from secateurs.evaluation.speed import NEW_TOKENS, PROMPT_TOKENS, bench
from secateurs.runtime import compress
from secateurs.runtime.quantizer import linear_shapes

# 403 million weights in the blocks, 34 million in each of the embedding and the head.
GEOMETRY = LlamaConfig(
    vocab_size=16384,
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    max_position_embeddings=2048,
)


def prune_by_magnitude(model: LlamaForCausalLM, sparsity: float) -> None:
    """Zeroes the smallest weights of the blocks; they are as normal as they were initialised."""
    threshold = GEOMETRY.initializer_range * math.sqrt(2) * float(torch.erfinv(torch.tensor(sparsity)))
    for name in linear_shapes(model):
        if name != "lm_head":
            weight = model.get_submodule(name).weight.data
            weight[weight.abs() < threshold] = 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    settings = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        wide, dense = Path(scratch) / "wide", Path(scratch) / "dense"
        model = LlamaForCausalLM(GEOMETRY).to(torch.bfloat16)
        parameters = sum(weight.numel() for weight in model.parameters())

        def measure(sparsity: float, folder: Path, against: Path | None, kinds: list[str]) -> None:
            for kind, cost in zip(kinds, bench(folder, against=against), strict=True):
                row = {"kind": kind, "sparsity": sparsity} | dataclasses.asdict(cost)
                del row["model"], row["perplexity"]
                rows.append(row)
                print(row, flush=True)

        LlamaForCausalLM(GEOMETRY).save_pretrained(wide)
        measure(0.0, wide, None, ["dense float32"])
        for sparsity in sorted(settings.sparsities):
            prune_by_magnitude(model, sparsity)
            model.save_pretrained(dense)
            folder = Path(scratch) / f"{sparsity}"
            compress(dense, folder)
            measure(sparsity, folder, dense, ["compressed", "dense bfloat16"])
    about = environment() | {
        "parameters": parameters,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
    }
    save(RESULTS / "generate_cpu.json", about, rows)


if __name__ == "__main__":
    main()
