"""Output tokens per second of vLLM on the CPU, dense and compressed, at one request and at many.

A Llama of half the blocks of generate_cpu.py's, random weights pruned by magnitude. Each folder has a vLLM in
a process of its own, and all stay, and take turns, for each number of requests: that many prompts of 8 tokens
continued by 32, the prompts counted in the time. Figures are medians over rounds, and ratios are within a
round. Runs where vLLM is installed (tools/check_vllm.py says how).

    python benchmarks/vllm_throughput.py
"""

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from common import RESULTS, Record, arguments, environment, print_row, print_table, save
from generate_cpu import GEOMETRY
from random_models import prune_by_magnitude, round_to_nearest
from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.scales import write_scales
from secateurs.runtime import compress
from secateurs.values import Values
from timing import in_turns, speedup

PROMPT, NEW = 8, 32
KINDS: dict[str, tuple[float, Values | None]] = {
    "dense bfloat16": (0.0, None),
    "bfloat16, 50 % zeros": (0.5, None),
    "int4, 50 % zeros": (0.5, Values(4, 64, "half")),
    "int4": (0.0, Values(4, 64)),
}


class Engine:
    """vLLM with one folder loaded, in a process of its own.

    Args:
        folder: of the model; it needs no tokenizer.
        most: requests at a time.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_start, initargs=(folder, most))

    def seconds(self, requests: int) -> float:
        """That this takes."""
        return self._pool.submit(_generate, requests).result()


_engine: Any


def _start(folder: Path, most: int) -> None:
    global _engine
    # In this process, and no more of it than is needed while the others have their turns.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM

    _engine = LLM(
        str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=PROMPT + NEW,
        max_num_seqs=most,
    )


def _generate(requests: int) -> float:
    from vllm import SamplingParams

    ids = torch.randint(GEOMETRY.vocab_size, (requests, PROMPT)).tolist()
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    _engine.generate([{"prompt_token_ids": each} for each in ids], greedy, use_tqdm=False)
    return time.perf_counter() - start


def write_folders(scratch: Path, blocks: int) -> dict[str, Path]:
    """The folder of each kind."""
    torch.manual_seed(0)
    GEOMETRY.num_hidden_layers = blocks
    LlamaForCausalLM(GEOMETRY).to(torch.bfloat16).save_pretrained(scratch / "0")
    folders = {}
    for number, (kind, (sparsity, values)) in enumerate(KINDS.items()):
        folders[kind] = scratch / str(number)
        if not sparsity and values is None:
            continue
        model = LlamaForCausalLM.from_pretrained(scratch / "0", dtype=torch.bfloat16)
        if sparsity:
            prune_by_magnitude(model, sparsity)
        scales = {} if values is None else round_to_nearest(model, values)
        model.save_pretrained(scratch / f"{number} dense")
        write_scales(scratch / f"{number} dense", scales)
        compress(scratch / f"{number} dense", output=folders[kind])
    return folders


def throughput(folders: Mapping[str, Path], requests: list[int], rounds: int) -> list[Record]:
    """A row for each number of requests and each folder."""
    engines = {kind: Engine(folder, max(requests)) for kind, folder in folders.items()}
    sizes = {kind: Checkpoint(folder).bytes for kind, folder in folders.items()}
    rows: list[Record] = []
    for number in requests:
        times = in_turns({kind: partial(engine.seconds, number) for kind, engine in engines.items()}, rounds)
        for kind, seconds in times.items():
            row = {
                "requests": number,
                "kind": kind,
                "file_bytes": sizes[kind],
                "tokens_per_second": number * NEW / statistics.median(seconds),
                "speedup": speedup(times, kind, "dense bfloat16"),
                "seconds": seconds,
            }
            rows.append(row)
            print_row([number, kind, sizes[kind] / 1e6, row["tokens_per_second"], row["speedup"]])
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "vllm.json")
    settings = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # the engines' processes take it over
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_folders(Path(scratch), settings.blocks)
        print_table(["requests", "stored as", "MB", "tokens per second", "times dense"], [])
        rows = throughput(folders, settings.requests, settings.rounds)
    about = environment() | {"prompt": PROMPT, "new": NEW}
    about |= {name: getattr(settings, name) for name in ("blocks", "threads", "rounds")}
    save(settings.output, about, rows)


if __name__ == "__main__":
    main()
