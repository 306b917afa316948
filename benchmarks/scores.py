"""How good a saved model is: its perplexity, and how far its predictions are from the dense model's."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Chebyshev
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import secateurs
from common import Record, print_table
from secateurs.device import resolve_device


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All the tensors in a model's folder, by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def causal_model(folder: Path) -> Any:
    """A saved model as transformers loads it, to be evaluated, on a GPU if there is one."""
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(resolve_device(None))


def perplexities(
    folder: Path, texts: dict[str, torch.Tensor], length: int, bos: int | None = None
) -> dict[str, float]:
    """Of a saved folder on each text's tokens, as transformers loads it; all its numbers must be finite.

    Args:
        bos: a token that every window begins with, as `secateurs.perplexity` takes it.
    """
    for name, tensor in saved_tensors(folder).items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{folder}: {name} holds NaN or Inf")
    model = causal_model(folder)
    return {
        name: secateurs.perplexity(model, tokens, length=length, bos=bos) for name, tokens in texts.items()
    }


def divergences(
    dense: Path,
    pruned: Path,
    texts: dict[str, torch.Tensor],
    length: int,
    windows: int = 16,
    bos: int | None = None,
) -> dict[str, float]:
    """KL(dense || pruned) of saved models' predictions, nats, over the first windows of each text.

    Args:
        bos: a token that every window begins with, as `secateurs.divergence` takes it.
    """
    models = [causal_model(folder) for folder in (dense, pruned)]
    return {
        name: secateurs.divergence(*models, tokens, length=length, windows=windows, bos=bos)
        for name, tokens in texts.items()
    }


def quality(dense: Path, folder: Path, texts: dict[str, torch.Tensor], length: int, windows: int) -> Record:
    """Perplexity and divergence of a saved folder, for a row of results."""
    return {
        "perplexity": perplexities(folder, texts, length),
        "divergence": divergences(dense, folder, texts, length, windows),
    }


def print_quality(columns: dict[str, str], rows: list[Record], more: dict[str, str] | None = None) -> None:
    """A table of rows with `quality`, the largest first.

    Args:
        columns: headings of what comes before, and the rows' keys for it.
        rows: with their "bytes".
        more: of what comes after.
    """
    after, kinds = more or {}, ("perplexity", "divergence")
    texts = [(name, kind) for name in rows[0]["perplexity"] for kind in kinds]
    print_table(
        [*columns, *(f"{name} {kind}" for name, kind in texts), *after],
        [
            [
                *(row[key] for key in columns.values()),
                *(row[kind][name] for name, kind in texts),
                *(row[key] for key in after.values()),
            ]
            for row in sorted(rows, key=lambda row: -row["bytes"])
        ],
    )


def tempered(
    folder: Path, texts: dict[str, torch.Tensor], length: int, windows: int = 64
) -> dict[str, Record]:
    """The perplexity of each text's first windows at the temperature that suits them best, and that one.

    A temperature divides the logits. Perplexity falls when a model that is too sure of itself becomes less
    sure, whatever it has forgotten meanwhile. Compared at their best temperatures (Guo et al., arXiv
    1706.04599), models differ by the rest. The loss is smooth in 1/temperature: the polynomial through it at
    twelve points gives the minimum.
    """
    lowest, highest = 0.1, 1.6
    inverses = (lowest + highest) / 2 + (highest - lowest) / 2 * np.cos(np.pi * (np.arange(12) + 0.5) / 12)
    model = causal_model(folder)
    found = {}
    for name, tokens in texts.items():
        blocks = tokens[: len(tokens) // length * length].view(-1, 1, length)[:windows].to(model.device)
        losses = np.zeros(len(inverses))
        with torch.no_grad():
            for block in blocks:
                logits = model(block).logits[0, :-1].float()
                cross_entropy = (
                    torch.nn.functional.cross_entropy(logits * inverse, block[0, 1:]) for inverse in inverses
                )
                losses += np.array([float(loss) for loss in cross_entropy]) / len(blocks)
        curve = Chebyshev.fit(inverses, losses, len(inverses) - 1, domain=[lowest, highest])
        fine = np.linspace(lowest, highest, 10_001)
        best = int(curve(fine).argmin())
        if best in (0, len(fine) - 1):
            raise RuntimeError(f"{folder}: the best temperature for {name} is not between 0.6 and 10")
        found[name] = {"temperature": float(1 / fine[best]), "perplexity": float(np.exp(curve(fine[best])))}
    return found
