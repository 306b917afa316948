"""Quality by zeros and bits: what a byte a weight buys, and GPTQ by llm-compressor on the same tokens.

Each cell is a run of `prune` (or of llm-compressor) in a process of its own, saved, loaded by transformers
and measured on the first windows of each text: perplexity, and the divergence of the dense model's
predictions from the cell's. Bytes a weight are those of the matrices in the blocks: codes of what is left, a
bit of mask where there are zeros, and two bytes for each scale. A cell in the results is not repeated:
interrupt at will, and run the same command again.

    python benchmarks/values.py --calibration ../data/wikitext-2/valid.txt \
        --texts ../data/wikitext-2/test.txt ../data/books/Dracula_345.txt \
        --patterns 0% 30% 50% --values int4 int3 int2 --methods magnitude sparsellm

Without `--model` it is the model that the package carries. `--peer-python` is the interpreter of an
environment with llm-compressor, which then rounds to int4 with groups of 64 at 0%.
"""

import tempfile
from itertools import product
from pathlib import Path

import tyro
from safetensors.torch import save_file
from transformers import AutoTokenizer

from common import RESULTS, Record, environment, load, save
from job import in_processes
from scores import print_quality, quality
from secateurs.demo import MODEL
from secateurs.pattern import parse_pattern, share_of
from secateurs.text import calibration_blocks, evaluation_tokens
from secateurs.values import parse_values

AS_STORED = "as stored"
PEER: Record = {"tool": "llmcompressor", "method": "gptq", "pattern": "0%"}


def bytes_of_a_weight(pattern: str, values: str) -> float:
    """Of bfloat16 values, or of a grid."""
    sparsity = 0.0 if share_of(pattern) == 0 else parse_pattern(pattern).sparsity
    mask = 1 / 8 if sparsity else 0
    if values == AS_STORED:
        return 2 * (1 - sparsity) + mask
    grid = parse_values(values)
    return (1 - sparsity) * grid.bits / 8 + mask + 2 / grid.group


def main(
    calibration: Path,
    texts: tuple[Path, ...],
    model: Path = MODEL,
    patterns: tuple[str, ...] = ("0%", "50%"),
    values: tuple[str, ...] = ("int8", "int4", "int3", "int2"),
    methods: tuple[str, ...] = ("sparsellm",),
    peer_python: Path | None = None,
    samples: int = 64,
    length: int = 256,
    windows: int = 32,
    window: int = 512,
    seed: int = 0,
    results: Path = RESULTS / "values.json",
) -> None:
    settings = {
        "model": model.name if model != MODEL else "bundled",
        "calibration": calibration.name,
        "texts": [text.name for text in texts],
        "samples": samples,
        "length": length,
        "windows": windows,
        "window": window,
        "seed": seed,
    }
    about = {**environment(), **settings}
    rows = load(results, settings)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = calibration_blocks(calibration, tokenizer, samples=samples, length=length, seed=seed)
    evaluation = {text.stem: evaluation_tokens(text, tokenizer)[: windows * window] for text in texts}
    cells = [("", "0%", AS_STORED)]
    cells += [cell for cell in product(methods, patterns, values) if cell[1:] != ("0%", AS_STORED)]
    if peer_python is not None:
        cells.append(("llm-compressor gptq", "0%", "int4"))
    done = {(row["method"], row["pattern"], row["values"]) for row in rows}
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        save_file({"ids": ids}, here / "ids.safetensors")
        for method, pattern, grid in cells:
            if (method, pattern, grid) in done:
                continue
            output, runs = model, []
            if method:
                output = here / "out"
                job: Record = {"model": str(model), "tokens": str(here / "ids.safetensors")}
                if method.startswith("llm-compressor"):
                    job |= PEER
                else:
                    job |= {"tool": "secateurs", "method": method, "pattern": pattern}
                    job |= {} if grid == AS_STORED else {"values": grid}
                pythons = {"": str(peer_python)} if job["tool"] == "llmcompressor" else None
                runs = in_processes({"": {**job, "output": str(output)}}, 1, pythons)[""]
            rows.append(
                {
                    "method": method,
                    "pattern": pattern,
                    "values": grid,
                    "bytes": bytes_of_a_weight(pattern, grid),
                    **quality(model, output, evaluation, window, windows),
                    "runs": runs,
                    "revision": about["revision"],
                }
            )
            save(results, about, rows)
            print(method, pattern, grid, rows[-1]["perplexity"], rows[-1]["divergence"], flush=True)

    print_quality(
        {"method": "method", "zeros": "pattern", "values": "values", "bytes a weight": "bytes"}, rows
    )


if __name__ == "__main__":
    tyro.cli(main)
