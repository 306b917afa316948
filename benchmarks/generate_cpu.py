"""Tokens per second of a whole model on the CPU, dense and compressed, paired in one run.

A Llama with random weights, pruned by magnitude, written, compressed and loaded as a user would; speed does
not depend on what the weights say. All models take turns within each round, at a prompt and at the tokens
after it; figures are medians over rounds, and ratios of the same round.

    python benchmarks/generate_cpu.py
"""

import itertools
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from common import RESULTS, Record, arguments, environment, save
from random_models import prune_by_magnitude
from secateurs.checkpoint import Checkpoint
from secateurs.runtime import compress
from secateurs.runtime.generate import Pace, greedy_tokens
from secateurs.runtime.load import load_model
from timing import in_turns, speedup

# 369 million weights in the blocks, 34 million in each of the embedding and the head.
GEOMETRY = LlamaConfig(
    vocab_size=16384,
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    max_position_embeddings=2048,
)


def pace_of(model: LlamaForCausalLM, prompt: Tensor, new: int) -> Pace:
    """Of so many new tokens after a prompt."""
    pace = Pace()
    for _ in itertools.islice(greedy_tokens(model, prompt, pace), new):
        pass
    return pace


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=17, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    prompt = torch.randint(GEOMETRY.vocab_size, (1, settings.prompt))
    models, sizes, sparsity_of = {}, {}, {}
    with tempfile.TemporaryDirectory() as scratch:

        def add(kind: str, folder: Path, sparsity: float) -> None:
            models[kind], sizes[kind] = load_model(folder, "cpu"), Checkpoint(folder).bytes
            sparsity_of[kind] = sparsity

        model = LlamaForCausalLM(GEOMETRY)
        parameters = sum(weight.numel() for weight in model.parameters())
        for dtype in (torch.float32, torch.bfloat16):
            kind = f"dense {dtype}".replace("torch.", "")
            model.to(dtype).save_pretrained(Path(scratch) / kind)
            add(kind, Path(scratch) / kind, 0.0)
        for sparsity in sorted(settings.sparsities):
            prune_by_magnitude(model, sparsity)
            kind = f"compressed {sparsity:.0%}"
            model.save_pretrained(Path(scratch) / "pruned")
            compress(Path(scratch) / "pruned", Path(scratch) / kind)
            add(kind, Path(scratch) / kind, sparsity)
        del model
        runs = {kind: partial(pace_of, loaded, prompt, settings.new) for kind, loaded in models.items()}
        paces = in_turns(runs, settings.rounds)
    dense = [kind for kind in paces if kind.startswith("dense")]
    a_token = {kind: [1 / pace.tokens_per_second for pace in own] for kind, own in paces.items()}
    first = {kind: [pace.seconds_to_first for pace in own] for kind, own in paces.items()}
    rows: list[Record] = []
    for kind, measured in paces.items():
        row = {
            "kind": kind,
            "sparsity": sparsity_of[kind],
            "file_bytes": sizes[kind],
            "tokens_per_second": statistics.median(pace.tokens_per_second for pace in measured),
            "seconds_to_first_token": statistics.median(pace.seconds_to_first for pace in measured),
            "decoding_speedup": speedup(a_token, kind, *dense),
            "prompt_speedup": speedup(first, kind, *dense),
        }
        rows.append(row)
        print(row, flush=True)
    save(RESULTS / "generate_cpu.json", environment() | vars(settings) | {"parameters": parameters}, rows)


if __name__ == "__main__":
    main()
