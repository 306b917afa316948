"""The same model in as many bytes by llama.cpp and by us: perplexity, divergence, tokens a second.

llama.cpp quantises a GGUF file of the model, with an importance matrix from the same calibration text; we
round (and prune) the folder, and compress it. Bytes are those of the files of weights; a GGUF file has its
tokenizer inside. Quality is that of the weights, read with activations as they are, in both cases: a GGUF
file is turned into a folder for it. Speed is each program's own, one token after another after an empty
prompt, by llama-bench and by our generation, in turns.

    python benchmarks/bytes_vs_gguf.py --cache ../cache --llama ../llama.cpp/build/bin \
        --model ../SmolLM2-135M-Instruct --gguf ../SmolLM2-135M-Instruct.gguf \
        --calibration ../data/wikitext-2/valid.txt \
        --texts ../data/wikitext-2/test.txt ../data/books/Dracula_345.txt

Without `--model` it is the bundled one, of which a GGUF file is written. `--threads` with nothing after it
leaves speed out.

The binaries (llama-quantize, llama-imatrix, llama-bench) are best built on the machine, with GGML_NATIVE. A
cell in the results is not repeated: interrupt at will, and run the same command again.
"""

import hashlib
import json
import statistics
from functools import partial
from pathlib import Path

import tyro
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateurs
from common import RESULTS, Record, environment, load, save
from job import in_processes
from llama_cpp import NEW_TOKENS, importance_matrix, quantised, speed_of_folder, speed_of_gguf, write_gguf
from scores import print_quality, quality
from secateurs.checkpoint import Checkpoint, resolve
from secateurs.demo import MODEL
from secateurs.runtime.load import load_model
from secateurs.text import calibration_blocks, evaluation_tokens
from timing import in_turns

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ3_M", "IQ2_M")

INT8, INT4 = "int8:group=128", "int4"
"""Of embeddings."""


def rounded(values: str, embedding: str, pattern: str = "0%", method: str = "sparsegpt") -> Record:
    """SparseGPT where nothing is pruned: no time is lost."""
    return {
        "tool": "secateurs",
        "method": method,
        "pattern": pattern,
        "values": values,
        "embedding": embedding,
    }


def budget(size: str, embedding: str) -> Record:
    return {"tool": "secateurs", "method": "admm", "budget": size, "embedding": embedding}


def recovered(tokens: int, learning_rate: float) -> Record:
    return {"tool": "recover", "tokens": tokens, "learning_rate": learning_rate, "length": 256}


OURS: dict[str, dict[str, tuple[Record, ...]]] = {
    "SmolLM2-135M-Instruct": {
        "int8": (rounded("int8:group=128", INT8),),
        "budget of 105 MB": (budget("105MB", INT8),),
        "int4:group=32, embedding int8": (rounded("int4:group=32", INT8),),
        "budget of 93 MB": (budget("93MB", INT8),),
        "int4, embedding int8": (rounded("int4", INT8),),
        "int4": (rounded("int4", INT4),),
        "budget of 77.5 MB": (budget("77.5MB", INT4),),
        "int3:group=32": (rounded("int3:group=32", INT4),),
        "int3": (rounded("int3", INT4),),
        "int2:group=32": (rounded("int2:group=32", INT4),),
        "50% zeros, int4": (rounded("int4", INT4, "50%", "sparsellm"),),
    },
    "demo": {
        "int8": (rounded("int8:group=128", INT8),),
        "budget of 3.78 MB": (budget("3.78MB", INT8),),
        "int4, embedding int8": (rounded("int4", INT8),),
        "budget of 3.27 MB": (budget("3.27MB", INT8),),
        "int4": (rounded("int4", INT4),),
        "budget of 2.77 MB": (budget("2.77MB", INT4),),
        "int3": (rounded("int3", INT4),),
        "budget of 2.35 MB": (budget("2.35MB", INT4),),
        "budget of 2.17 MB": (budget("2.17MB", INT4),),
        "50% zeros, int3": (rounded("int3", INT4, "50%", "sparsellm"),),
        "int2": (rounded("int2", INT4),),
        "int3, recovered": (rounded("int3", INT4), recovered(300_000, 1e-3)),
        "budget of 2.17 MB, recovered": (budget("2.17MB", INT4), recovered(300_000, 1e-3)),
        "int2, recovered": (rounded("int2", INT4), recovered(300_000, 1e-3)),
        "80% zeros, recovered, int4": (
            {"tool": "secateurs", "pattern": "80%"},
            recovered(1_000_000, 1.5e-3),
            rounded("int4", INT4),
        ),
    },
}
"""What is made of each model, by one step after another."""


def made(model: Path, form: str, tokens: Path, text: Path, cache: Path) -> tuple[Path, Path, list[Record]]:
    """Our folder, ordinary and compressed, and what each step took.

    Args:
        model: the dense one.
        form: its name in the table.
        tokens: to calibrate on.
        text: that they come from; recovery is on half of it and half self-written.
        cache: keeps all.
    """
    folder, runs, steps = model, [], OURS[name_of(model)][form]
    for i, step in enumerate(steps):
        name = hashlib.sha256(json.dumps(steps[: i + 1]).encode()).hexdigest()[:16]
        output, took = cache / f"{name_of(model)}-{name}", cache / f"{name_of(model)}-{name}.json"
        if not took.exists():
            job = {**step, "model": str(folder), "output": str(output)}
            if step["tool"] == "recover":
                job |= {"towards": str(model), "calibration": {str(text): 0.5, "self": 0.5}}
            else:
                job["tokens"] = str(tokens)
            took.write_text(json.dumps(in_processes({"": job}, 1)[""][0]))
        folder = output
        runs.append(json.loads(took.read_text()))
    small = folder.with_name(f"{folder.name}-small")
    if not small.exists():
        secateurs.compress(folder, small)
    return folder, small, runs


def name_of(model: Path) -> str:
    return "demo" if model == MODEL else model.name


def main(
    llama: Path,
    calibration: Path,
    texts: tuple[Path, ...],
    cache: Path,
    model: Path = MODEL,
    gguf: Path | None = None,
    types: tuple[str, ...] = TYPES,
    samples: int = 16,
    length: int = 512,
    windows: int = 16,
    repetitions: int = 3,
    threads: tuple[int, ...] = (1, 2),
    results: Path = RESULTS / "bytes_vs_gguf.json",
) -> None:
    about = {
        "model": name_of(model),
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
    if gguf is None:
        gguf = cache / f"{name_of(model)}.gguf"
        if not gguf.exists():
            write_gguf(AutoModelForCausalLM.from_pretrained(model, dtype="auto"), gguf, tokenizer)
    evaluation = {text.stem: evaluation_tokens(text, tokenizer)[: windows * length] for text in texts}

    def add(program: str, form: str, folder: Path, size: int, runs: list[Record]) -> None:
        row: Record = {"program": program, "form": form, "bytes": size, "runs": runs}
        row |= quality(model, folder, evaluation, length, windows)
        rows.append(row)
        save(results, {**environment(), **about}, rows)
        print(program, form, size, row["perplexity"], row["divergence"], flush=True)

    known = {(row["program"], row["form"]) for row in rows}
    if ("", "as stored") not in known:
        add("", "as stored", model, Checkpoint(model).bytes, [])
    files: dict[str, Path] = {}
    matrix = importance_matrix(gguf, llama, ids, tokenizer, cache)
    for kind in types:
        files[kind] = quantised(gguf, kind, llama, cache, matrix)
        if ("llama.cpp", kind) not in known:
            add("llama.cpp", kind, Path(resolve(files[kind])), files[kind].stat().st_size, [])
    smalls: dict[str, Path] = {}
    for form in OURS[name_of(model)]:
        output, smalls[form], runs = made(model, form, cache / "ids.safetensors", calibration, cache)
        if ("secateurs", form) not in known:
            add("secateurs", form, output, Checkpoint(smalls[form]).bytes, runs)

    for count in threads:
        field = f"tokens_per_second_{count}"
        if all(field in row for row in rows):
            continue
        speeds_by = {
            ("llama.cpp", kind): partial(speed_of_gguf, file, llama, count) for kind, file in files.items()
        }
        folders = {("", "as stored"): model, **{("secateurs", form): path for form, path in smalls.items()}}
        speeds_by |= {key: partial(speed_of_folder, load_model(path), count) for key, path in folders.items()}
        speeds = in_turns(speeds_by, repetitions)
        for row in rows:
            row[field] = statistics.median(speeds[row["program"], row["form"]])
        save(results, {**environment(), **about}, rows)
    speeds_of = {f"tokens/s, {count} threads": f"tokens_per_second_{count}" for count in threads}
    print_quality({"": "program", "form": "form", "bytes": "bytes"}, rows, speeds_of)


if __name__ == "__main__":
    tyro.cli(main)
