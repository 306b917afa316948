"""Draws the plots of docs/runtime.md from the raw results. Needs matplotlib.

python benchmarks/plot_runtime.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from common import RESULTS

PLOTS = Path(__file__).parents[1] / "docs" / "plots"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def decode_cpu() -> None:
    """Bytes and speed of one block against sparsity, with the dense references and the bound."""
    result = read("decode_cpu")
    rows, settings = result["rows"], result["settings"]
    width, mlp = settings["width"], settings["mlp"]
    weights = 4 * width * width + 3 * width * mlp
    sparsities = [row["sparsity"] for row in rows]
    figure, (bytes_axes, speed_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    bytes_axes.plot(
        sparsities, [row["bytes"]["compressed"] / weights for row in rows], "o-", label="compressed"
    )
    for name, style in (("dense float32", "--"), ("dense bfloat16", ":")):
        bytes_axes.axhline(rows[0]["bytes"][name] / weights, linestyle=style, color="grey", label=name)
    bytes_axes.set(xlabel="sparsity", ylabel="bytes per weight", ylim=(0, None))
    bytes_axes.legend()

    def rate(name: str) -> list[float]:
        return [1 / row["seconds"][name] if name in row["seconds"] else float("nan") for row in rows]

    speed_axes.plot(sparsities, rate("compressed"), "o-", label="compressed")
    speed_axes.plot(sparsities, rate("plain read"), "k-", lw=1, label="bound: a plain read of the same bytes")
    speed_axes.plot(sparsities, rate("dense bfloat16"), ":", color="grey", label="dense bfloat16")
    speed_axes.plot(sparsities, rate("dense float32"), "--", color="grey", label="dense float32")
    speed_axes.plot(sparsities, rate("torch CSR float32"), "s-", label="torch CSR float32")
    speed_axes.set(xlabel="sparsity", ylabel="blocks per second, one token", yscale="log")
    speed_axes.legend()
    figure.suptitle(
        f"A block of width {width}, MLP {mlp}; {settings['threads']} threads, {result['machine']['cpu']}"
    )
    figure.savefig(PLOTS / "decode_cpu.svg")


def generate_cpu() -> None:
    """Tokens per second and memory of a whole model against sparsity."""
    result = read("generate_cpu")
    rows = result["rows"]
    compressed = [row for row in rows if row["model"] != "dense"]
    dense = [row for row in rows if row["model"] == "dense"]
    sparsities = [row["sparsity"] for row in compressed]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    fields = (("tokens_per_second", 1, "tokens per second"), ("memory_bytes", 1e9, "GB in memory after load"))
    for ax, (field, unit, label) in zip(axes, fields, strict=True):
        ax.plot(sparsities, [row[field] / unit for row in compressed], "o-", label="compressed")
        ax.plot(sparsities, [row[field] / unit for row in dense], "s--", color="grey", label="dense bfloat16")
        ax.set(xlabel="sparsity of the blocks", ylabel=label, ylim=(0, None))
        ax.legend()
    figure.suptitle(f"A Llama of {result['settings']['parameters'] / 1e6:.0f} million parameters")
    figure.savefig(PLOTS / "generate_cpu.svg")


def bytes_vs_perplexity(name: str) -> None:
    """Perplexity against the bytes of the linear layers, on each text."""
    result = read(f"bytes_vs_perplexity_{name}")
    texts = list(result["rows"][0]["perplexity"])
    figure, axes = plt.subplots(
        1, len(texts), figsize=(5 * len(texts), 4), layout="constrained", squeeze=False
    )
    for ax, text in zip(axes[0], texts, strict=True):
        sparse = [row for row in result["rows"] if "compressed" in row["kind"]]
        ax.plot(
            [row["bytes"] / row["weights"] for row in sparse],
            [row["perplexity"][text] for row in sparse],
            "o-",
            label=f"{result['settings']['method']}, compressed bfloat16",
        )
        for row, marker in zip([row for row in result["rows"] if row not in sparse], "sD^", strict=False):
            ax.plot(
                row["bytes"] / row["weights"],
                row["perplexity"][text],
                marker,
                ls="",
                label=row["kind"],
            )
        ax.set(xlabel="bytes per weight of the blocks", ylabel=f"perplexity on {text}", yscale="log")
        ax.legend()
    figure.savefig(PLOTS / f"bytes_vs_perplexity_{name}.svg")


if __name__ == "__main__":
    PLOTS.mkdir(exist_ok=True)
    decode_cpu()
    generate_cpu()
    for file in sorted(RESULTS.glob("bytes_vs_perplexity_*.json")):
        bytes_vs_perplexity(file.stem.removeprefix("bytes_vs_perplexity_"))
