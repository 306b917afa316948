"""The same model in as many bytes by llama.cpp and by us: perplexity, divergence, tokens a second.

llama.cpp quantises a GGUF file of the model, with an importance matrix from the same calibration text; we
round (and prune) the folder, and compress it. Bytes are those of the files of weights; a GGUF file has its
tokenizer inside. Quality is that of the weights, read with activations as they are, in both cases: a GGUF
file is turned into a folder for it. Speed is each program's own, one token after another after an empty
prompt, by llama-bench and by our generation, in turns.

    python benchmarks/bytes_vs_gguf.py --model ../SmolLM2-135M-Instruct --gguf ../SmolLM2-135M-Instruct.gguf \
        --llama ../llama.cpp/build/bin --calibration ../data/wikitext-2/valid.txt \
        --texts ../data/wikitext-2/test.txt ../data/books/Dracula_345.txt

The binaries (llama-quantize, llama-imatrix, llama-bench) are best built on the machine, with GGML_NATIVE. A
cell in the results is not repeated: interrupt at will, and run the same command again.
"""

import json
import statistics
from functools import partial
from pathlib import Path

import tyro
from safetensors.torch import save_file
from transformers import AutoTokenizer

import secateurs
from common import RESULTS, Record, environment, load, save
from job import in_processes
from llama_cpp import NEW_TOKENS, importance_matrix, quantised, speed_of_folder, speed_of_gguf
from scores import print_quality, quality
from secateurs.checkpoint import Checkpoint, resolve
from secateurs.runtime.load import load_model
from secateurs.text import calibration_blocks, evaluation_tokens
from timing import in_turns

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ3_M", "IQ2_M")

OURS: dict[str, Record] = {
    "int8": {"pattern": "0%", "values": "int8:group=128", "embedding": "int8:group=128"},
    "budget of 105 MB": {"method": "admm", "budget": "105MB", "embedding": "int8:group=128"},
    "int4:group=32, embedding int8": {
        "pattern": "0%",
        "values": "int4:group=32",
        "embedding": "int8:group=128",
    },
    "budget of 93 MB": {"method": "admm", "budget": "93MB", "embedding": "int8:group=128"},
    "int4, embedding int8": {"pattern": "0%", "values": "int4", "embedding": "int8:group=128"},
    "int4": {"pattern": "0%", "values": "int4", "embedding": "int4"},
    "budget of 77.5 MB": {"method": "admm", "budget": "77.5MB", "embedding": "int4"},
    "int3:group=32": {"pattern": "0%", "values": "int3:group=32", "embedding": "int4"},
    "int3": {"pattern": "0%", "values": "int3", "embedding": "int4"},
    "int2:group=32": {"pattern": "0%", "values": "int2:group=32", "embedding": "int4"},
    "50% zeros, int4": {"method": "sparsellm", "pattern": "50%", "values": "int4", "embedding": "int4"},
}
"""Settings of `prune`, by SparseGPT where no method is named: nothing is pruned, and no time is lost."""


def pruned(model: Path, form: str, tokens: Path, cache: Path) -> tuple[Path, Path, Record]:
    """Our folder, ordinary and compressed, and what making it took."""
    name = f"{model.name}-{form}".translate(str.maketrans(" :=%", "____"))
    output, small = cache / name, cache / f"{name}-small"
    job: Record = {"tool": "secateurs", "model": str(model), "tokens": str(tokens), "output": str(output)}
    job |= {"method": "sparsegpt", **OURS[form]}
    if not (cache / f"{name}.json").exists():
        run = in_processes({"": job}, 1)[""][0]
        (cache / f"{name}.json").write_text(json.dumps(run))
    if not small.exists():
        secateurs.compress(output, small)
    return output, small, json.loads((cache / f"{name}.json").read_text())


def main(
    model: Path,
    gguf: Path,
    llama: Path,
    calibration: Path,
    texts: tuple[Path, ...],
    cache: Path,
    types: tuple[str, ...] = TYPES,
    samples: int = 16,
    length: int = 512,
    windows: int = 16,
    repetitions: int = 3,
    threads: tuple[int, ...] = (1, 2),
    results: Path = RESULTS / "bytes_vs_gguf.json",
) -> None:
    about = {
        "model": model.name,
        "calibration": calibration.name,
        "texts": [text.name for text in texts],
        "samples": samples,
        "length": length,
        "windows": windows,
        "repetitions": repetitions,
        "new_tokens": NEW_TOKENS,
    }
    rows = load(results, about)
    tokenizer = AutoTokenizer.from_pretrained(model)
    cache.mkdir(parents=True, exist_ok=True)
    ids = calibration_blocks(calibration, tokenizer, samples=samples, length=length)
    save_file({"ids": ids}, cache / "ids.safetensors")
    evaluation = {text.stem: evaluation_tokens(text, tokenizer)[: windows * length] for text in texts}

    def add(program: str, form: str, folder: Path, size: int, run: Record | None) -> None:
        row = {"program": program, "form": form, "bytes": size, "run": run}
        row |= quality(model, folder, evaluation, length, windows)
        rows.append(row)
        save(results, {**environment(), **about}, rows)
        print(program, form, size, row["perplexity"], row["divergence"], flush=True)

    known = {(row["program"], row["form"]) for row in rows}
    if ("", "as stored") not in known:
        add("", "as stored", model, Checkpoint(model).bytes, None)
    files: dict[str, Path] = {}
    matrix = importance_matrix(gguf, llama, ids, tokenizer, cache)
    for kind in types:
        files[kind] = quantised(gguf, kind, llama, cache, matrix)
        if ("llama.cpp", kind) not in known:
            add("llama.cpp", kind, Path(resolve(files[kind])), files[kind].stat().st_size, None)
    smalls: dict[str, Path] = {}
    for form in OURS:
        output, smalls[form], run = pruned(model, form, cache / "ids.safetensors", cache)
        if ("secateurs", form) not in known:
            add("secateurs", form, output, Checkpoint(smalls[form]).bytes, run)

    for count in threads:
        field = f"tokens_per_second_{count}"
        if all(field in row for row in rows):
            continue
        runs = {
            ("llama.cpp", kind): partial(speed_of_gguf, file, llama, count) for kind, file in files.items()
        }
        folders = {("", "as stored"): model, **{("secateurs", form): path for form, path in smalls.items()}}
        runs |= {key: partial(speed_of_folder, load_model(path), count) for key, path in folders.items()}
        speeds = in_turns(runs, repetitions)
        for row in rows:
            row[field] = statistics.median(speeds[row["program"], row["form"]])
        save(results, {**environment(), **about}, rows)
    speeds_of = {f"tokens/s, {count} threads": f"tokens_per_second_{count}" for count in threads}
    print_quality({"": "program", "form": "form", "bytes": "bytes"}, rows, speeds_of)


if __name__ == "__main__":
    tyro.cli(main)
