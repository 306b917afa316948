"""What bfloat16 costs SparseLLM, product by product, in the MLP of one block of the bundled Llama.

Gate and up are pruned to 70 % by SparseGPT; s and z are those of the dense MLP. Each row is a result of one
iteration computed as a bfloat16 model's is, and as a float32 model's, where all that goes before it is
computed in the same way: the relative error against float64, |found - exact| / |exact|, from the same
weights and inputs (which are bfloat16 numbers).

    python benchmarks/sparsellm_precision.py
"""

from dataclasses import replace
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from common import RESULTS, Record, environment, print_table, save
from secateurs import SparseGPT, Statistics, Unstructured
from secateurs.demo import CALIBRATION, MODEL
from secateurs.device import multiplies_bfloat16, resolve_device
from secateurs.pruning.mlp.linear import Linear, apply, cast
from secateurs.pruning.mlp.problem import MLP
from secateurs.pruning.mlp.sparsellm import SparseLLM
from secateurs.pruning.mlp.steps import correct_p, hidden_inverse
from secateurs.pruning.solvers.statistics import Products
from secateurs.text import calibration_blocks, load_tokenizer

PATTERN = Unstructured(0.7)


def mlp_and_inputs(block: int, samples: int, length: int) -> tuple[MLP, Tensor]:
    """The dense MLP, and what it reads: (tokens, hidden), bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    ids = calibration_blocks(CALIBRATION, load_tokenizer(MODEL), samples=samples, length=length, seed=0)
    part = model.model.layers[block].mlp
    seen: list[Tensor] = []
    part.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    for batch in ids.split(8):
        model(batch)
    gate, up, down = (
        Linear(layer.weight, None, PATTERN) for layer in (part.gate_proj, part.up_proj, part.down_proj)
    )
    return MLP((gate, up), down, True, nn.SiLU()), torch.cat(seen)


def computed(
    dense: MLP, pruned: MLP, x: Tensor, running: torch.dtype, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What one iteration computes.

    Args:
        dense: the dense MLP.
        pruned: with gate and up pruned.
        x: its inputs.
        running: what tokens run in.
        dtype: of sums and factors.
    """
    ratio = SparseLLM().gamma
    x, down = x.to(running), dense.down.weight.to(dtype)
    y = apply(cast(dense.down, running), dense.channels(apply(cast(dense.stacked(), running), x)))
    channels = pruned.channels(apply(cast(pruned.stacked(), running), x))
    moments = Statistics(down.shape[1], dtype=dtype, device=x.device)
    moments.update(channels)
    products = Products(*down.shape, dtype=dtype, device=x.device)
    products.update(y, channels)
    # Down as pruned before: what p is corrected by is then no rounding.
    cut = torch.where(PATTERN.keep(down.abs().float()), down, 0)
    auxiliary = apply(cast(dense.stacked(), running), x)
    q = dense.channels(auxiliary)
    gap = y.to(dtype) - (q @ cut.to(running).T).to(dtype)
    inverse = hidden_inverse(cut @ cut.T, ratio)
    correction, _ = correct_p(gap, (inverse @ cut).to(running), inverse, ratio)
    goal = Products(auxiliary.shape[1], x.shape[1], dtype=dtype, device=x.device)
    goal.update(auxiliary, x)
    return {
        "gate and up": auxiliary,
        "the input of down": channels,
        "second moments of it": moments.moment,
        "what down is fitted by": products.moment,
        "down, fitted": moments.fit(down, products.moment, SparseLLM().damping),
        "what f(s) z leaves of Y": gap,
        "the correction of p": correction,
        "p": q.to(dtype) + correction,
        "what gate and up are fitted by": goal.moment,
    }


def main(
    block: int = 2,
    samples: int = 32,
    length: int = 256,
    results: Path = RESULTS / "sparsellm_precision.json",
) -> None:
    device = resolve_device(None)
    if not multiplies_bfloat16(device):
        raise SystemExit("this device has no instructions for products of bfloat16 matrices")
    with torch.no_grad():
        dense, x = mlp_and_inputs(block, samples, length)
        dense = replace(
            dense,
            first=tuple(replace(layer, weight=layer.weight.to(device)) for layer in dense.first),
            down=replace(dense.down, weight=dense.down.weight.to(device)),
        )
        x = x.to(device)
        moments = Statistics.from_inputs(x)
        cut = [SparseGPT().solve(layer.weight, moments, PATTERN).weight.bfloat16() for layer in dense.first]
        pruned = replace(dense, first=tuple(Linear(weight, None, PATTERN) for weight in cut))
        exact = computed(dense, pruned, x, torch.float64, torch.float64)
        found = {
            running: computed(dense, pruned, x, running, torch.float32)
            for running in (torch.bfloat16, torch.float32)
        }
    rows: list[Record] = []
    for name, reference in exact.items():
        errors = {
            str(running).removeprefix("torch."): float((result[name] - reference).norm() / reference.norm())
            for running, result in found.items()
        }
        rows.append({"result": name, **errors})
    about = {**environment(), "block": block, "samples": samples, "length": length, "device": device.type}
    save(results, about, rows)
    print_table(["", "a bfloat16 model", "a float32 model"], [list(row.values()) for row in rows])


if __name__ == "__main__":
    tyro.cli(main)
