"""Draws the plots of docs/runtime.md from the raw results. Needs matplotlib.

python benchmarks/plot_runtime.py
"""

import json
from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common import HERE, RESULTS, Record

PLOTS = HERE.parent / "docs" / "plots"


def read(name: str) -> Record:
    return json.loads((RESULTS / f"{name}.json").read_text())


def save_plot(figure: Figure, name: str) -> None:
    figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})


def decode_cpu() -> None:
    """Bytes and speed of one block against sparsity, with the dense references and the bound."""
    result = read("decode_cpu")
    rows, about = result["rows"], result["about"]
    width, mlp = about["width"], about["mlp"]
    weights = 4 * width * width + 3 * width * mlp
    sparsities = [row["sparsity"] for row in rows]
    figure, (bytes_axes, speed_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    bytes_axes.plot(
        sparsities, [row["bytes"]["compressed"] / weights for row in rows], "o-", label="compressed bfloat16"
    )
    bytes_axes.axhline(2, linestyle=":", color="grey", label="dense bfloat16")
    for size, label in ((1, "dense int8"), (0.53, "dense int4")):
        bytes_axes.axhline(size, linestyle="--", color="grey", lw=0.8)
        bytes_axes.annotate(label, (0, size), textcoords="offset points", xytext=(0, 3), color="grey")
    bytes_axes.set(xlabel="sparsity", ylabel="bytes per weight", ylim=(0, None))
    bytes_axes.legend()

    def rate(name: str) -> list[float]:
        return [1 / row["seconds"][name] if name in row["seconds"] else float("nan") for row in rows]

    speed_axes.plot(sparsities, rate("plain read"), "k-", lw=1, label="bound: a plain read of the same bytes")
    speed_axes.plot(sparsities, rate("compressed"), "o-", label="compressed bfloat16")
    speed_axes.plot(sparsities, rate("torch CSR float32"), "s-", label="torch CSR float32")
    speed_axes.plot(sparsities, rate("dense bfloat16"), ":", color="grey", label="torch dense bfloat16")
    speed_axes.plot(sparsities, rate("dense float32"), "--", color="grey", label="torch dense float32")
    speed_axes.set(xlabel="sparsity", ylabel="blocks per second, one token", yscale="log")
    speed_axes.legend(fontsize="small")
    figure.suptitle(f"A block of width {width}, MLP {mlp}; {about['threads']} threads of an {about['cpu']}")
    save_plot(figure, "decode_cpu")


def generate_cpu() -> None:
    """Tokens per second and bytes of a whole model against sparsity."""
    result = read("generate_cpu")
    rows, about = result["rows"], result["about"]
    compressed = [row for row in rows if row["kind"].startswith("compressed")]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    fields = (("tokens_per_second", 1, "tokens per second"), ("file_bytes", 1e9, "GB in files and memory"))
    for ax, (field, unit, label) in zip(axes, fields, strict=True):
        ax.plot(
            [row["sparsity"] for row in compressed],
            [row[field] / unit for row in compressed],
            "o-",
            label="compressed bfloat16",
        )
        for row, style in zip([row for row in rows if row not in compressed], ("--", ":"), strict=True):
            ax.axhline(row[field] / unit, linestyle=style, color="grey", label=row["kind"])
        ax.set(xlabel="sparsity of the blocks", ylabel=label, ylim=(0, None))
        ax.legend()
    figure.suptitle(
        f"A Llama of {about['parameters'] / 1e6:.0f} million parameters; threads: {about['threads']}"
    )
    save_plot(figure, "generate_cpu")


def bytes_vs_perplexity(name: str) -> None:
    """Perplexity against the bytes of the linear layers, on each text."""
    result = read(f"bytes_vs_perplexity_{name}")
    texts = list(result["rows"][0]["perplexity"])
    sparse = [row for row in result["rows"] if "sparsity" in row]
    dense = [row for row in result["rows"] if "sparsity" not in row]
    figure, axes = plt.subplots(
        1, len(texts), figsize=(5 * len(texts), 4), layout="constrained", squeeze=False
    )
    for ax, text in zip(axes[0], texts, strict=True):
        ax.plot(
            [row["bytes_per_weight"] for row in sparse],
            [row["perplexity"][text] for row in sparse],
            "o-",
            label=f"pruned ({result['about']['method']}), compressed bfloat16",
        )
        for row in sparse:
            place = (row["bytes_per_weight"], row["perplexity"][text])
            ax.annotate(f"{row['sparsity']:.0%}", place, textcoords="offset points", xytext=(4, 4))
        for row, marker in zip(dense, "sD^v", strict=True):
            ax.plot(row["bytes_per_weight"], row["perplexity"][text], marker, color="grey", label=row["kind"])
        ax.set(xlabel="bytes per weight of the blocks", ylabel=f"perplexity on {text}", yscale="log")
        ax.legend(fontsize="small")
    figure.suptitle(f"The trained {name} of this repository")
    save_plot(figure, f"bytes_vs_perplexity_{name}")


PROGRAMS = {"llama.cpp": "s", "secateurs": "o", "secateurs, blocks by transformers": "x"}
"""The marker of each."""


def points(ax: Axes, rows: list[Record], name: str, height: Callable[[Record], float]) -> None:
    """What programs make of one model, each with its name: how high against how many MB."""
    for program, marker in PROGRAMS.items():
        own = [row for row in rows if row["program"] == program]
        places = [(row["bytes" if "bytes" in row else "file_bytes"] / 1e6, height(row)) for row in own]
        if own:
            ax.plot(*zip(*places, strict=True), marker, label=program)
        for place, row in zip(places, own, strict=True):
            label = row[name].replace(", groups of ", "/") if program in ("llama.cpp", "secateurs") else ""
            rest = [other for other in places if other != place]
            nearest = min(rest, key=lambda other, x=place[0]: abs(other[0] - x), default=place)
            where = {"va": "bottom" if place[1] > nearest[1] else "top"}
            where |= {"ha": "right", "xytext": (-5, 0)} if program == "llama.cpp" else {"xytext": (5, 0)}
            ax.annotate(label, place, textcoords="offset points", fontsize=6, **where)
    ax.margins(0.2, 0.1)


def generate_vs_llama() -> None:
    """Tokens per second against the bytes of a file, on one thread and two."""
    result = read("generate_vs_llama")
    threads = sorted({row["threads"] for row in result["rows"]})
    figure, axes = plt.subplots(
        1, len(threads), figsize=(6.5 * len(threads), 5), layout="constrained", squeeze=False
    )
    for ax, count in zip(axes[0], threads, strict=True):
        rows = [row for row in result["rows"] if row["threads"] == count and row["file_bytes"] < 1e9]
        points(ax, rows, "kind", lambda row: row["tokens_per_second"])
        ax.set(xlabel="MB in files", ylabel="tokens per second", title=f"threads: {count}")
        ax.legend(loc="lower left", fontsize="small")
    figure.suptitle(f"The geometry of Llama-3.2-1B; {result['about']['cpu']}")
    save_plot(figure, "generate_vs_llama")


def bytes_vs_gguf(name: str) -> None:
    """Divergence from the model as it is stored against the bytes of a file, on each text."""
    result = read(name)
    texts = list(result["rows"][0]["perplexity"])
    figure, axes = plt.subplots(
        1, len(texts), figsize=(6.5 * len(texts), 5), layout="constrained", squeeze=False
    )
    for ax, text in zip(axes[0], texts, strict=True):
        points(ax, result["rows"], "form", lambda row, text=text: row["divergence"][text])
        ax.set(xlabel="MB in files", ylabel=f"divergence on {text}, nats a token", yscale="log")
        ax.legend(fontsize="small")
    figure.suptitle(result["about"]["model"])
    save_plot(figure, name)


if __name__ == "__main__":
    PLOTS.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "secateurs"  # the same results draw the same files
    decode_cpu()
    generate_cpu()
    generate_vs_llama()
    bytes_vs_gguf("bytes_vs_gguf")
    bytes_vs_gguf("bytes_vs_gguf_bundled")
    for file in sorted(RESULTS.glob("bytes_vs_perplexity_*.json")):
        bytes_vs_perplexity(file.stem.removeprefix("bytes_vs_perplexity_"))
