"""What it costs that products with codes round activations to eight bits.

A compressed model multiplies straight from the codes, each token rounded to eight bits in groups
(docs/format.md). Here windows of a text are read so, and by expanded weights with tokens as they are.
Perplexity of each, and the divergence of the second from the first, for folders that `secateurs compress`
wrote.

    python benchmarks/rounded_activations.py small-int4 small-int2 --texts ../data/wikitext-2/test.txt
"""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from transformers import AutoTokenizer

from common import RESULTS, environment, load, print_table, save
from secateurs.runtime import kernels
from secateurs.runtime.load import load_model
from secateurs.text import evaluation_tokens


@torch.no_grad()
def predictions(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Logarithms of the probabilities, (length, vocabulary)."""
    logits: torch.Tensor = model(input_ids=window[None]).logits[0]
    return logits.float().log_softmax(-1)


def main(
    folders: tyro.conf.Positional[tuple[Path, ...]],
    texts: tuple[Path, ...],
    length: int = 512,
    windows: int = 12,
    results: Path = RESULTS / "rounded_activations.json",
) -> None:
    about = {"texts": [text.name for text in texts], "length": length, "windows": windows}
    rows = load(results, about)
    for folder in folders:
        model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
        for text in texts:
            if any((row["model"], row["text"]) == (folder.name, text.stem) for row in rows):
                continue
            tokens = evaluation_tokens(text, tokenizer)
            whole = tokens[: len(tokens) // length * length].view(-1, length)
            losses, divergences = [], []
            for window in whole[torch.arange(windows) * len(whole) // windows]:
                both = []
                for most in (0, sys.maxsize):
                    with patch.object(kernels, "direct_tokens", lambda *_, most=most: most):
                        both.append(predictions(model, window))
                expanded, direct = both
                pair = torch.stack(both)[:, :-1]
                losses.append(-pair.gather(-1, window[1:, None].expand(2, -1, 1)).mean((1, 2)))
                divergences.append((expanded.exp() * (expanded - direct)).sum(-1).mean())
            expanded_ppl, direct_ppl = torch.stack(losses).mean(0).exp().tolist()
            rows.append(
                {
                    "model": folder.name,
                    "text": text.stem,
                    "perplexity": expanded_ppl,
                    "perplexity_of_products_with_codes": direct_ppl,
                    "divergence": float(torch.stack(divergences).mean()),
                }
            )
            save(results, {**environment(), **about}, rows)
    print_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    tyro.cli(main)
