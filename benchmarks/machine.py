"""What a figure was measured on and with: goes into every raw result."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, threads, GPU and versions."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        fields = dict(
            line.split(":", 1)
            for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
            if ":" in line
        )
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        cpu = f"{fields.get('model name')}, family {fields.get('cpu family')} model {fields.get('model')}"
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def write(name: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "settings": settings, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
