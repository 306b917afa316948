"""SparseGPT and Wanda: Secateurs against llm-compressor, on the same model and the same calibration tokens.

llm-compressor comes from PyPI, in an environment of its own, given by its interpreter. Both sides read the
same folder and the same file of token ids, and write a folder; each run has a process of its own, the two
taking turns; the clock covers loading, pruning and writing, not the imports; memory is the whole process's.
Then the same code measures the perplexity of all the folders. "block" is our walk in llm-compressor's
order, and its default, where all of a block's inputs are measured on the dense block. The other is
"sublayer", which measures the MLP's inputs after attention was pruned. The last columns compare with the
faster, and the smaller, of the two batch sizes of llm-compressor.

    python -m venv ../venv-peer && ../venv-peer/bin/pip install llmcompressor
    python benchmarks/compare_llmcompressor.py --peer-python ../venv-peer/bin/python --models ../out/llama \
        --calibration ../data/wikitext-2/valid.txt --texts ../data/wikitext-2/test.txt
"""

import tempfile
from itertools import product
from pathlib import Path

import tyro
from safetensors.torch import save_file
from transformers import AutoTokenizer

from common import RESULTS, Record, environment, middle, print_table, save
from job import in_processes
from scores import perplexities
from secateurs.text import calibration_blocks, evaluation_tokens

TOOLS: dict[str, Record] = {
    "llmcompressor": {"tool": "llmcompressor"},
    "llmcompressor, batches of 8": {"tool": "llmcompressor", "batch_size": 8},
    "secateurs, block": {"tool": "secateurs", "sequential": "block"},
    "secateurs": {"tool": "secateurs", "sequential": "sublayer"},
}
PEERS = [name for name, tool in TOOLS.items() if tool["tool"] == "llmcompressor"]


def main(
    peer_python: Path,
    models: tuple[Path, ...],
    calibration: Path,
    texts: tuple[Path, ...],
    methods: tuple[str, ...] = ("sparsegpt", "wanda"),
    patterns: tuple[str, ...] = ("50%", "70%", "2:4"),
    samples: int = 64,
    length: int = 512,
    windows: int = 64,
    seed: int = 0,
    repetitions: int = 3,
    results: Path = RESULTS / "compare_llmcompressor.json",
) -> None:
    about = {
        **environment(),
        "calibration": calibration.name,
        "samples": samples,
        "length": length,
        "windows": windows,
        "seed": seed,
    }
    pythons = {name: str(peer_python) for name in PEERS}
    rows: list[Record] = []
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        for model in models:
            tokenizer = AutoTokenizer.from_pretrained(model)
            ids = calibration_blocks(calibration, tokenizer, samples=samples, length=length, seed=seed)
            save_file({"ids": ids}, here / "ids.safetensors")
            evaluation = {text.stem: evaluation_tokens(text, tokenizer)[: windows * length] for text in texts}
            for method, pattern in product(methods, patterns):
                shared = {"model": str(model), "tokens": str(here / "ids.safetensors")}
                shared |= {"method": method, "pattern": pattern}
                jobs = {name: {**shared, **tool, "output": str(here / name)} for name, tool in TOOLS.items()}
                for name, runs in in_processes(jobs, repetitions, pythons).items():
                    row = {"model": model.name, "method": method, "pattern": pattern, "tool": name}
                    scores = perplexities(here / name, evaluation, length)
                    rows.append({**row, "perplexity": scores, "runs": runs})
                    print(
                        *row.values(), *(f"{text} {score:.2f}" for text, score in scores.items()), flush=True
                    )
                save(results, about, rows)

    table = []
    for row in rows:
        alike = [r for r in rows if all(r[key] == row[key] for key in ("model", "method", "pattern"))]
        peers = [r["runs"] for r in alike if r["tool"] in PEERS]
        seconds, peak = middle(row["runs"], "seconds"), middle(row["runs"], "peak_bytes")
        table.append(
            [
                row["model"],
                row["method"],
                row["pattern"],
                row["tool"],
                *row["perplexity"].values(),
                seconds,
                min(middle(peer, "seconds") for peer in peers) / seconds,
                peak / 1e6,
                peak / min(middle(peer, "peak_bytes") for peer in peers),
            ]
        )
    header = ["model", "method", "pattern", "tool", *(text.stem for text in texts)]
    print_table([*header, "seconds", "speed-up", "peak MB", "share of peer's"], table)


if __name__ == "__main__":
    tyro.cli(main)
