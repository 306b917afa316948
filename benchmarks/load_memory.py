"""Memory that loading a model takes, dense and compressed: at its peak, and when every weight has been read.

The Llama of generate_cpu.py, each folder in a process of its own. Weights are memory-mapped: their pages
count as the process's once they are read, and the system may drop them again; "private" is what it may not.

    python benchmarks/load_memory.py
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from common import RESULTS, Record, environment, print_table, save
from generate_cpu import GEOMETRY
from random_models import prune_by_magnitude
from secateurs.checkpoint import Checkpoint
from secateurs.runtime import SparseLinear, compress

SPARSITIES = (0.5, 0.7, 0.9)


def status() -> dict[str, int]:
    """Bytes of this process: at the peak, now, and of those the private ones."""
    text = Path("/proc/self/status").read_text()
    fields = {"peak": "VmHWM", "now": "VmRSS", "private": "RssAnon"}
    return {name: 1024 * int(re.search(rf"{field}:\s*(\d+)", text)[1]) for name, field in fields.items()}


def measure(folder: Path) -> Record:
    """What `load_model` adds to a process, and one token after it."""
    from secateurs.runtime.load import load_model

    before = status()
    model = load_model(folder, "cpu")
    loaded = status()
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.int64))
    read = status()
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    weights = sum(m.in_features * m.out_features for m in layers)
    held = sum(tensor.nbytes for m in layers for tensor in (m.weight, m.offsets))
    promised = sum(2 * m.layout.nonzeros + m.in_features * m.out_features / 8 for m in layers)
    return {
        "file_bytes": Checkpoint(folder).bytes,
        "peak_of_loading_bytes": loaded["peak"] - before["now"],
        "private_after_loading_bytes": loaded["private"] - before["private"],
        "after_a_token_bytes": read["now"] - before["now"],
        "layers": len(layers),
        "bytes_per_weight": held / weights if layers else 2,
        "promised_bytes_per_weight": promised / weights if layers else 2,
    }


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(GEOMETRY).to(torch.bfloat16)
    rows: list[Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        for sparsity in (0.0, *SPARSITIES):
            folder = Path(scratch) / f"{sparsity}"
            if sparsity:
                prune_by_magnitude(model, sparsity)
            model.save_pretrained(folder)
            if sparsity:
                dense, folder = folder, Path(scratch) / f"{sparsity}-compressed"
                compress(dense, folder)
            run = [sys.executable, __file__, str(folder)]
            done = subprocess.run(run, capture_output=True, text=True, check=True)
            rows.append({"sparsity": sparsity} | json.loads(done.stdout.splitlines()[-1]))
    save(RESULTS / "load_memory.json", environment(), rows)
    print_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(Path(sys.argv[1]))))
    else:
        main()
