"""A token through all blocks in one call of C++, beside transformers' own code on the same packed weights.

Random weights in the geometry of published models, with a small vocabulary: half of them zero, the others
in bfloat16. Both ways take turns in one process; figures are medians over rounds, of one thread.

    taskset -c 0 python benchmarks/one_call.py
"""

import copy
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GraniteConfig, LlamaConfig, SmolLM3Config

from common import RESULTS, Record, environment, print_table, save
from generate_cpu import pace_of
from random_models import prune_by_magnitude
from secateurs.runtime import compress
from secateurs.runtime.load import load_model
from timing import in_turns, speedup

VOCABULARY = 2048


def sizes(width: int, channels: int, blocks: int, heads: int, shared: int, of_head: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": channels,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": of_head,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    }


GEOMETRIES: dict[str, Any] = {
    "SmolLM2-135M": LlamaConfig(**sizes(576, 1536, 30, 9, 3, 64)),
    "Gemma 3 270M": Gemma3TextConfig(**sizes(640, 2048, 18, 4, 1, 256), sliding_window=512),
    "Gemma 3 1B": Gemma3TextConfig(**sizes(1152, 6912, 26, 4, 1, 256), sliding_window=512),
    "Granite 3.3 2B, 8 blocks": GraniteConfig(**sizes(2048, 8192, 8, 32, 8, 64), residual_multiplier=0.22),
    "SmolLM3 3B, 8 blocks": SmolLM3Config(**sizes(2048, 11008, 8, 16, 4, 128)),
}


def main(
    models: tuple[str, ...] = tuple(GEOMETRIES),
    prompt: int = 128,
    new: int = 33,
    rounds: int = 5,
    results: Path = RESULTS / "one_call.json",
) -> None:
    """See above.

    Args:
        models: whose geometry.
        prompt: tokens of it.
        new: tokens after it.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    here, rows, table = environment(), list[Record](), []
    ids = torch.randint(3, VOCABULARY, (1, prompt))
    for name in models:
        with tempfile.TemporaryDirectory() as scratch:
            model = AutoModelForCausalLM.from_config(GEOMETRIES[name], dtype=torch.bfloat16)
            prune_by_magnitude(model, 0.5)
            model.save_pretrained(Path(scratch) / "pruned")
            del model
            compress(Path(scratch) / "pruned", Path(scratch) / "small")
            quick: Any = load_model(Path(scratch) / "small", "cpu")
        own = copy.deepcopy(quick)
        del own.get_decoder().forward
        runs = {"own": partial(pace_of, own, ids, new), "one call": partial(pace_of, quick, ids, new)}
        paces = in_turns(runs, rounds)
        seconds = {way: [1 / pace.tokens_per_second for pace in found] for way, found in paces.items()}
        rows.append({"model": name, "seconds_a_token": seconds})
        save(results, here | {"prompt": prompt, "new": new}, rows)
        per_second = {way: 1 / median(found) for way, found in seconds.items()}
        table.append([name, *per_second.values(), speedup(seconds, "one call", "own")])
    print_table(["", "transformers' code, tokens/s", "one call, tokens/s", "times as fast"], table)


if __name__ == "__main__":
    tyro.cli(main)
