"""Rounding layer by layer: what the sweep and the passes after it bring, and a mask chosen in the same sweep.

The relative error of the outputs (towards the dense layer's) of the matrices of a block in the middle of a
model, by what they were rounded with; all inputs are the dense model's. "nearest" has each group's best
scale and nothing else; "one sweep" is SparseGPT's joint one (2301.00774, section 3.5), which chooses the mask
of 128 columns when it reaches them and rounds on the way; the others round what SparseGPT or ADMM left. Then
processor seconds for one square matrix, on one thread.

    python benchmarks/rounding.py --calibration ../data/wikitext-2/valid.txt
"""

import time
from pathlib import Path
from statistics import mean

import torch
import tyro
from torch import Tensor
from transformers import AutoTokenizer

from common import RESULTS, Record, environment, print_table, save
from secateurs import ADMM, SparseGPT, Statistics
from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint import Checkpoint
from secateurs.demo import MODEL
from secateurs.pattern import Mask, Unstructured
from secateurs.pruning.allocation.survey import Layer, Survey
from secateurs.pruning.solvers import grid
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.sweep import blocks, choose
from secateurs.text import calibration_blocks
from secateurs.values import Values, parse_values


def nearest(weight: Tensor, statistics: Statistics, kept: Tensor, values: Values) -> Tensor:
    """Each group's best scale by itself, by the inputs' norms."""
    rounded = weight.T.contiguous()
    importance = statistics.norms.square()
    for start in range(0, len(rounded), values.group):
        now = slice(start, start + values.group)
        keep = kept.T[now].contiguous()
        scale = grid.choose_scales(rounded[now], keep, importance[now], values)
        rounded[now] = grid.levels_of(rounded[now], scale, values) * scale * keep
    return rounded.T


def one_sweep(weight: Tensor, statistics: Statistics, pattern: Unstructured, values: Values) -> Tensor:
    """The mask of 128 columns, and then their groups' scales, are chosen when the sweep reaches them."""
    rounded = weight.T.contiguous()
    for now, inverse in blocks(rounded, statistics.factor(0.01), 128):
        part, diagonal = rounded[now], inverse.diagonal()
        keep = choose(part, diagonal, pattern)
        push = inverse / -diagonal[:, None]
        for start in range(0, len(part), values.group):
            group, rest = slice(start, start + values.group), slice(start + values.group, None)
            before = part[group].clone()
            scale = grid.choose_scales(before, keep[group], diagonal[group] ** -2, values)
            grid.settle(part[group], None, keep[group], scale, push[group, group], values)
            # What is left of a group's own errors, in its own columns' order, goes to the rest of the block.
            errors = torch.linalg.solve_triangular(inverse[group, group].T, before - part[group], upper=False)
            part[rest] -= inverse[group, rest].T @ errors
    return rounded.T


def trials(layer: Layer, sparsity: float, values: Values) -> dict[str, float]:
    """Relative errors by what rounded it."""
    weight, statistics = layer.weight.float(), layer.statistics
    found: dict[str, Tensor] = {}
    starts = {"": weight}
    if sparsity:
        pattern = Unstructured(sparsity)
        found["one sweep"] = one_sweep(weight, statistics, pattern, values)
        starts = {
            "sparsegpt, ": SparseGPT().solve(weight, statistics, pattern).weight,
            "admm, ": ADMM().solve(weight, statistics, pattern).weight,
        }
    for name, start in starts.items():
        kept = start != 0 if sparsity else torch.ones_like(start, dtype=torch.bool)
        if sparsity:
            found[f"{name}not rounded"] = start
        found[f"{name}nearest"] = nearest(start, statistics, kept, values)
        for passes in (0, 1, 2, 4, 8):
            solved = Rounding(values, passes, shrinkage=0.0).solve(start, statistics, Mask(kept))
            found[f"{name}sweep, {passes} passes"] = solved.weight
    return {name: statistics.error(weight, rounded) for name, rounded in found.items()}


def seconds(width: int) -> dict[str, float]:
    """Of a processor, for a square matrix: of its factor, then of solvers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator)
    statistics = Statistics.from_inputs(torch.randn(width, width, generator=generator))
    kept = torch.rand(width, width, generator=generator) > 0.5
    found = {}
    start = time.process_time()
    statistics.factor(0.01)
    found["factor"] = time.process_time() - start
    for name, solver, pattern in (
        ("sparsegpt", SparseGPT(), Unstructured(0.5)),
        ("rounding, 0 passes", Rounding(Values(4), 0), Mask(kept)),
        ("rounding, 2 passes", Rounding(Values(4), 2), Mask(kept)),
    ):
        start = time.process_time()
        solver.solve(weight, statistics, pattern)
        found[name] = time.process_time() - start
    return found


def main(
    calibration: Path,
    model: Path = MODEL,
    block: int = 4,
    samples: int = 64,
    length: int = 256,
    width: int = 4096,
    results: Path = RESULTS / "rounding.json",
) -> None:
    torch.set_num_threads(1)
    settings = {"model": model.name if model != MODEL else "bundled", "block": block}
    about = {**environment(), **settings, "samples": samples, "length": length, "width": width}
    ids = calibration_blocks(
        calibration, AutoTokenizer.from_pretrained(model), samples=samples, length=length, seed=0
    )
    survey = Survey(BlockwiseModel(Checkpoint(model), torch.device("cpu")), ids, 4, lambda name: None)
    rows: list[Record] = []
    for surveyed in survey.blocks():
        if surveyed.index != block:
            continue
        for sparsity in (0.0, 0.5):
            for text in ("int4", "int3", "int2"):
                errors = [trials(layer, sparsity, parse_values(text)) for layer in surveyed.layers]
                means = {name: mean(error[name] for error in errors) for name in errors[0]}
                rows.append({"sparsity": sparsity, "values": text, "error": means, "layers": errors})
        break
    rows.append({"seconds": seconds(width)})
    save(results, about, rows)
    for sparsity in (0.0, 0.5):
        some = [row for row in rows if row.get("sparsity") == sparsity]
        print_table(
            [f"{sparsity:.0%} zeros", *(row["values"] for row in some)],
            [[name, *(row["error"][name] for row in some)] for name in some[0]["error"]],
        )
    print(rows[-1]["seconds"])


if __name__ == "__main__":
    tyro.cli(main)
