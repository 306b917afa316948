"""What the benchmarks share: a fresh process for each measured run, and results that say whence they come.

Only the standard library is imported here, so that a peer's environment can run this file too.
"""

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = (
    "secateurs",
    "torch",
    "torchao",
    "transformers",
    "safetensors",
    "llmcompressor",
    "compressed-tensors",
)

Record = dict[str, Any]


def environment() -> Record:
    """Hardware, versions and command of this run; folders above the last name stay private."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    gpu = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    command = " ".join(["python", *sys.argv])
    return {
        "command": re.sub(r"(?<!\S)/\S*/", ".../", command),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": subprocess.check_output(gpu, text=True).strip() if shutil.which(gpu[0]) else None,
        "load_average_at_start": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "revision": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def versions() -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_bytes() -> int:
    """The most memory that this process has held. (`ru_maxrss` would include the parent's, before exec.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])  # type: ignore[index]


def in_fresh_process(job: Record, python: str = sys.executable) -> Record:
    """What job.py returns for `job`, whose output folder is made anew; its log is shown only if it fails."""
    shutil.rmtree(job["output"], ignore_errors=True)
    command = [python, str(HERE / "job.py"), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def alternate(
    jobs: dict[Any, Record], repetitions: int, pythons: dict[Any, str] | None = None
) -> dict[Any, list[Record]]:
    """Run each named job `repetitions` times, turn and turn about, so that a slow spell hits all alike."""
    results: dict[Any, list[Record]] = {name: [] for name in jobs}
    for _ in range(repetitions):
        for name, job in jobs.items():
            results[name].append(in_fresh_process(job, (pythons or {}).get(name, sys.executable)))
    return results


def middle(results: list[Record], *keys: str) -> float:
    """Median over the repetitions of a figure, `keys` deep."""

    def figure(result: Record) -> float:
        for key in keys:
            result = result[key]
        return result  # type: ignore[return-value]

    return statistics.median(figure(result) for result in results)


def random_llama(folder: Path, layers: int, dtype: str) -> Path:
    """A Llama of width 512 with random weights: MLP 1376, eight heads, Llama's 32000 tokens, no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def random_tokens(file: Path, samples: int, length: int) -> Path:
    """Calibration ids for `random_llama`."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file({"ids": torch.randint(32000, (samples, length))}, file)
    return file


def saved_tensors(folder: Path) -> dict[str, Any]:
    """All the tensors in a model's folder, by name."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def causal_model(folder: Path) -> Any:
    """A saved model as transformers loads it, to be evaluated, on a GPU if there is one."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from secateurs.device import resolve_device

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(resolve_device(None))


def perplexities(folder: Path, texts: dict[str, Any], length: int) -> dict[str, float]:
    """Of a saved folder on each text's tokens, as transformers loads it; all its numbers must be finite."""
    import secateurs

    for name, tensor in saved_tensors(folder).items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{folder}: {name} holds NaN or Inf")
    model = causal_model(folder)
    return {name: secateurs.perplexity(model, tokens, length=length) for name, tokens in texts.items()}


def divergences(
    dense: Path, pruned: Path, texts: dict[str, Any], length: int, windows: int = 16
) -> dict[str, float]:
    """KL(dense || pruned) of saved models' predictions, nats, over the first windows of each text."""
    import torch

    models = [causal_model(folder) for folder in (dense, pruned)]
    found = {}
    for name, tokens in texts.items():
        blocks = tokens[: len(tokens) // length * length].view(-1, 1, length)[:windows].to(models[0].device)
        total = 0.0
        with torch.no_grad():
            for block in blocks:
                wanted, given = (model(block).logits[0, :-1].float().log_softmax(dim=-1) for model in models)
                total += float((wanted.exp() * (wanted - given)).sum(dim=-1).mean())
        found[name] = total / len(blocks)
    return found


def tempered(folder: Path, texts: dict[str, Any], length: int, windows: int = 64) -> dict[str, Record]:
    """The perplexity of each text's first windows at the temperature that suits them best, and that one.

    A temperature divides the logits. Perplexity falls when a model that is too sure of itself becomes less
    sure, whatever it has forgotten meanwhile. Compared at their best temperatures (Guo et al., arXiv
    1706.04599), models differ by the rest. The loss is smooth in 1/temperature: the polynomial through it at
    twelve points gives the minimum.
    """
    import numpy as np
    import torch
    from numpy.polynomial import Chebyshev

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


def load(path: Path, settings: Record | None = None) -> list[Record]:
    """The rows of an earlier, perhaps interrupted, run, which must have had the same settings."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    for name, value in (settings or {}).items():
        before = earlier["about"].get(name, value)
        if before != value:
            raise SystemExit(f"{path} was measured with {name} {before}, not {value}: give another file")
    return earlier["rows"]


def save(path: Path, about: Record, rows: list[Record]) -> None:
    """Replace the file in one step, so that an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": about, "rows": rows}, indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    """As Markdown; numbers to four significant digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(cell(value) for value in row) + " |", flush=True)
