"""Tokens per second of a whole model on the CPU, dense and compressed, over sparsity.

A Llama with random weights, pruned by magnitude row by row, written, compressed and loaded as a user would;
speed does not depend on what the weights say. Each model is measured in a process of its own by `secateurs
bench`.

    python benchmarks/generate_cpu.py
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import RESULTS, environment, save
from secateurs.evaluation.speed import bench
from secateurs.runtime import compress
from secateurs.runtime.quantizer import linear_shapes

# 368 million weights in the blocks, 33 million in each of the embedding and the head.
GEOMETRY = LlamaConfig(
    vocab_size=16384,
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    max_position_embeddings=2048,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    settings = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch) / "dense"
        model = LlamaForCausalLM(GEOMETRY).to(torch.bfloat16)
        parameters = sum(weight.numel() for weight in model.parameters())
        for sparsity in sorted(settings.sparsities):
            for name in linear_shapes(model):
                if name != "lm_head":
                    weight = model.get_submodule(name).weight.data
                    scores = weight.abs().float()
                    weight[
                        scores < scores.kthvalue(int(sparsity * weight.shape[1]), dim=1, keepdim=True).values
                    ] = 0
            folder = Path(scratch) / f"{sparsity}"
            model.save_pretrained(dense)
            compress(dense, folder)
            for cost in bench(folder, against=dense):
                row = dataclasses.asdict(cost) | {"model": Path(cost.model).name, "sparsity": sparsity}
                rows.append(row)
                print(row, flush=True)
    save(RESULTS / "generate_cpu.json", environment() | vars(settings) | {"parameters": parameters}, rows)


if __name__ == "__main__":
    main()
