"""Tokens per second of a Llama of 1.2 billion weights: ours, and llama.cpp's, in turns.

The geometry is that of Llama-3.2-1B, the weights are random: speed does not depend on what they say. The
embedding, which is the head too and a fifth of all weights, is at eight bits with us where nothing else is
said, and at what llama.cpp's kinds give it (Q6_K in most). One token after another after an empty prompt, by
llama-bench and by our generation through transformers, or with --prompt so many tokens at once; figures are
medians over rounds, and ratios are within a round.

    python benchmarks/generate_vs_llama.py --llama ../llama.cpp/build/bin --cache ../cache
    python benchmarks/generate_vs_llama.py --llama ../llama.cpp/build/bin --cache ../cache --prompt 512 \
        --results benchmarks/results/prompt_vs_llama.json
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import RESULTS, Record, arguments, environment, print_row, print_table, save
from llama_cpp import NEW_TOKENS, build_of, quantised, speed_of_folder, speed_of_gguf, write_gguf
from random_models import prune_by_magnitude, round_to_nearest
from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.scales import write_scales
from secateurs.runtime import compress
from secateurs.runtime.load import load_model
from secateurs.values import Values
from timing import in_turns

GEOMETRY = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
EIGHT, FOUR = Values(8, 128), Values(4, 64)
OURS: dict[str, tuple[float, Values | None, Values | None]] = {
    "bfloat16": (0.0, None, None),
    "50 % zeros, bfloat16": (0.5, None, None),
    "50 % zeros, int4, groups of 128": (0.5, Values(4, 128, "half"), EIGHT),
    "70 % zeros, int4, groups of 128": (0.7, Values(4, 128, "half"), EIGHT),
    "int4, groups of 128": (0.0, Values(4, 128), EIGHT),
    "int3, groups of 64": (0.0, Values(3, 64), EIGHT),
    "50 % zeros, int4, groups of 128, int4 embedding": (0.5, Values(4, 128, "half"), FOUR),
    "int4, groups of 128, int4 embedding": (0.0, Values(4, 128), FOUR),
}
"""Zeros, what is left of the blocks, and the embedding."""
BY_TRANSFORMERS = "50 % zeros, int4, groups of 128, int4 embedding"
"""Of this one also what it does without the one call for all blocks (`secateurs.runtime.step`)."""
THEIRS = ("Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")


def write_folder(
    dense: Path, small: Path, sparsity: float, values: Values | None, embedding: Values | None
) -> None:
    """What `prune` and `compress` would leave, but for the method."""
    model = LlamaForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    if sparsity:
        prune_by_magnitude(model, sparsity)
    scales = {} if values is None else round_to_nearest(model, values, embedding)
    with tempfile.TemporaryDirectory(dir=small.parent) as pruned:
        model.save_pretrained(pruned)
        write_scales(Path(pruned), scales)
        compress(pruned, output=small)


def write_models(llama: Path, cache: Path) -> dict[tuple[str, str], Path]:
    """A file of llama.cpp's for each of its kinds, and a folder for each of ours."""
    dense, plain = cache / "dense", cache / "model.gguf"
    if not plain.exists():
        torch.manual_seed(0)
        model = LlamaForCausalLM(GEOMETRY).to(torch.bfloat16)
        model.save_pretrained(dense)
        write_gguf(model, plain)
    models = {("llama.cpp", kind): quantised(plain, kind, llama, cache) for kind in THEIRS}
    for number, (kind, form) in enumerate(OURS.items()):
        small = dense if form == (0.0, None, None) else cache / f"small-{number}"
        if not small.exists():
            write_folder(dense, small, *form)
        models["secateurs", kind] = small
    return models


def without_step(model: Any, threads: int) -> float:
    """New tokens a second where transformers' own code runs the blocks."""
    decoder = model.get_decoder()
    step = vars(decoder).pop("forward")
    try:
        return speed_of_folder(model, threads)
    finally:
        decoder.forward = step


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--llama", type=Path, required=True, help="folder of llama-quantize, llama-bench")
    parser.add_argument("--cache", type=Path, required=True, help="of the models, 12 GB")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=0, help="tokens to read at once; none are made then")
    parser.add_argument("--results", type=Path, default=RESULTS / "generate_vs_llama.json")
    settings = parser.parse_args()
    settings.cache.mkdir(parents=True, exist_ok=True)
    models = write_models(settings.llama, settings.cache)
    loaded = {kind: load_model(path, "cpu") for (program, kind), path in models.items() if path.is_dir()}
    about = {**environment(), "llama.cpp": build_of(settings.llama, models["llama.cpp", "Q4_0"])}
    rows: list[Record] = []
    print_table(["threads", "", "", "MB", "tokens/s", "times Q4_K_M's", "times Q4_0's"], [])
    for threads in settings.threads:
        runs = {
            (program, kind): partial(speed_of_folder, loaded[kind], threads, settings.prompt)
            if kind in loaded
            else partial(speed_of_gguf, path, settings.llama, threads, settings.prompt)
            for (program, kind), path in models.items()
        }
        if not settings.prompt:
            apart = "secateurs, blocks by transformers", BY_TRANSFORMERS
            runs[apart] = partial(without_step, loaded[BY_TRANSFORMERS], threads)
            models[apart] = models["secateurs", BY_TRANSFORMERS]
        speeds = in_turns(runs, settings.rounds)
        for (program, kind), path in models.items():
            own = speeds[program, kind]
            row = {
                "threads": threads,
                "program": program,
                "kind": kind,
                "file_bytes": Checkpoint(path).bytes if path.is_dir() else path.stat().st_size,
                "tokens_per_second": statistics.median(own),
                **{f"times_{rival}": ratio(own, speeds["llama.cpp", rival]) for rival in ("Q4_K_M", "Q4_0")},
                "rounds": own,
            }
            rows.append(row)
            print_row([threads, program, kind, row["file_bytes"] / 1e6, *list(row.values())[4:7]])
    about |= {"new_tokens": 0 if settings.prompt else NEW_TOKENS, "prompt": settings.prompt}
    about |= {"rounds": settings.rounds, "geometry": GEOMETRY.to_diff_dict()}
    save(settings.results, about, rows)


def ratio(own: list[float], others: list[float]) -> float:
    """How many times another's tokens per second; the median over rounds."""
    return statistics.median(ours / theirs for ours, theirs in zip(own, others, strict=True))


if __name__ == "__main__":
    main()
