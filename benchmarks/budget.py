"""Whether a budget's choice for each matrix is better than one for all: quality at equal bytes.

Each cell is a run of `prune` in a process of its own, then `compress`, whose packed bytes over the number of
weights in the blocks are what a cell is compared by. Perplexity, and the divergence of the dense model's
predictions from the cell's, on the first windows of each text; and beside them the error that the budget goes
by, summed over the matrices of the dense model. A cell in the results is not repeated: interrupt at will, and
run the same command again.

    python benchmarks/budget.py --calibration ../data/wikitext-2/valid.txt \
        --texts ../data/wikitext-2/test.txt ../data/books/Dracula_345.txt \
        --budgets 0.27 0.34 0.41 0.53 --uniform 0%/int4:group=128 0%/int3 50%/int3:group=128

Without `--model` it is the model that the package carries.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import save_file
from transformers import AutoTokenizer

import secateurs
from common import RESULTS, Record, environment, load, save
from job import in_processes
from scores import print_quality, quality
from secateurs import Report
from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint import Checkpoint
from secateurs.demo import MODEL
from secateurs.pattern import parse_pattern, share_of
from secateurs.pruning.allocation.fitting import measure_forms
from secateurs.pruning.allocation.forms import FORMS, Form
from secateurs.pruning.allocation.room import room_in
from secateurs.pruning.allocation.survey import Survey, layer_shapes
from secateurs.text import calibration_blocks, evaluation_tokens
from secateurs.values import parse_values


def form_of(pattern: str, values: str) -> Form:
    zeros = 0.0 if share_of(pattern) == 0 else parse_pattern(pattern).sparsity
    return Form(zeros, parse_values(values))


def packed_bytes(folder: Path, weights: int) -> float:
    """A weight, of what `compress` packs and what it leaves of the blocks' matrices."""
    layers = Checkpoint(folder).config["quantization_config"]["layers"]
    checkpoint = Checkpoint(folder)
    sizes = [checkpoint.shapes[f"{name}.weight"] for name in layers]
    assert all(len(size) == 1 for size in sizes)
    return sum(size[0] for size in sizes) / weights


def main(
    calibration: Path,
    texts: tuple[Path, ...],
    model: Path = MODEL,
    budgets: tuple[float, ...] = (0.27, 0.34, 0.41, 0.53),
    uniform: tuple[str, ...] = (),
    method: str = "sparsellm",
    samples: int = 64,
    length: int = 256,
    windows: int = 32,
    window: int = 512,
    seed: int = 0,
    results: Path = RESULTS / "budget.json",
) -> None:
    settings = {
        "model": model.name if model != MODEL else "bundled",
        "method": method,
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
    done = {row["chosen"] for row in rows}
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = calibration_blocks(calibration, tokenizer, samples=samples, length=length, seed=seed)
    evaluation = {text.stem: evaluation_tokens(text, tokenizer)[: windows * window] for text in texts}
    dense = BlockwiseModel(Checkpoint(model), torch.device("cpu"))
    weights = sum(rows * columns for rows, columns in layer_shapes(dense).values())
    room = room_in(dense, 0, budget=None, bytes_per_weight=1.0)
    survey = Survey(dense, ids, max(1, 2048 // length), lambda name: None)
    expected = dict(zip(FORMS, np.sum(measure_forms(survey, room), axis=0).tolist(), strict=True))
    cells: list[tuple[str, Record]] = [(f"budget {b:g}", {"bytes_per_weight": b}) for b in budgets]
    for cell in uniform:
        pattern, values = cell.split("/")
        cells.append((str(form_of(pattern, values)), {"pattern": pattern, "values": values}))
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        save_file({"ids": ids}, here / "ids.safetensors")
        for name, chosen in cells:
            if name in done:
                continue
            output = here / "out"
            job: Record = {"tool": "secateurs", "model": str(model), "tokens": str(here / "ids.safetensors")}
            runs = in_processes({"": {**job, "output": str(output), "method": method, **chosen}}, 1)[""]
            secateurs.compress(output, output=here / name)
            report = Report.read(output)
            rows.append(
                {
                    "chosen": name,
                    "forms": report.forms and str(report.forms),
                    "bytes": packed_bytes(here / name, weights),
                    "expected": report.forms.error if report.forms else expected[form_of(**chosen)],
                    **quality(model, output, evaluation, window, windows),
                    "runs": runs,
                    "revision": about["revision"],
                }
            )
            save(results, about, rows)
            print(name, rows[-1]["bytes"], rows[-1]["perplexity"], rows[-1]["divergence"], flush=True)

    print_quality({"chosen": "chosen", "bytes a weight": "bytes", "expected": "expected"}, rows)


if __name__ == "__main__":
    tyro.cli(main)
