"""Perplexity against bytes: a trained model pruned and compressed, beside dense bfloat16, int8 and int4.

Bytes are those of the linear layers in the blocks, the part that pruning and quantisation change, with all
scales, minima and masks. int8 is torchao's weight-only quantisation (one scale per row). torchao's int4
needs a GPU, so int4 is simulated: rounded to nearest in groups with a bfloat16 scale and minimum each, as
its GPU kernels store it.

    python benchmarks/bytes_vs_perplexity.py MODEL --calibration FILE --texts FILE ... --name llama
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, PreTrainedModel

import secateurs
from common import RESULTS, Record, environment, save
from secateurs.runtime import SparseLinear, compress
from secateurs.runtime.packable import packables
from secateurs.text import evaluation_tokens, load_tokenizer

GROUPS = (128, 32)  # weights that share a scale in int4


def block_linears(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The linear layers of the blocks: all that may be compressed but the head."""
    head, layers = model.get_output_embeddings(), packables(model)
    return {
        name: module
        for name, module in model.named_modules()
        if module is not head and (name in layers or isinstance(module, SparseLinear))
    }


def to_int4(weight: torch.Tensor, group_size: int) -> int:
    """Rounds a weight (rows, columns) in place; the bytes that it would take."""
    groups = weight.split(group_size, dim=1)
    for group in groups:
        exact = group.float()
        low, high = exact.amin(1, keepdim=True), exact.amax(1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-9).bfloat16().float()
        low = low.bfloat16().float()
        group.copy_(((exact - low) / scale).round().clamp(0, 15) * scale + low)
    return weight.numel() // 2 + len(groups) * len(weight) * 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--name", required=True, help="of the model, in the result")
    parser.add_argument("--method", default="admm")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=65536, help="of each text, from its start")
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.6, 0.7, 0.8, 0.9])
    settings = parser.parse_args()
    tokenizer = load_tokenizer(settings.model)
    texts = {
        Path(text).stem: evaluation_tokens(text, tokenizer)[: settings.tokens] for text in settings.texts
    }
    rows: list[Record] = []

    def load(folder: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def measure(kind: str, model: PreTrainedModel, bytes_used: int, **more: float) -> None:
        figures = {name: secateurs.perplexity(model, tokens) for name, tokens in texts.items()}
        rows.append({"kind": kind, "bytes_per_weight": bytes_used / weights, "perplexity": figures} | more)
        print(f"{kind}: {bytes_used / weights:.3f} bytes per weight, {figures}", flush=True)

    dense = load(settings.model)
    weights = sum(module.weight.numel() for module in block_linears(dense).values())
    measure("bfloat16, dense", dense, 2 * weights)

    names = set(block_linears(dense))
    quantize_(dense, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in names)
    used = 0
    for name in names:
        weight = dense.get_submodule(name).weight
        used += sum(getattr(weight, part).nbytes for part in weight.__tensor_flatten__()[0])
    measure("int8, dense", dense, used)

    for group in GROUPS:
        int4 = load(settings.model)
        with torch.no_grad():
            used = sum(to_int4(module.weight.data, group) for module in block_linears(int4).values())
        measure(f"int4 in groups of {group}, dense", int4, used)

    for sparsity in settings.sparsities:
        with tempfile.TemporaryDirectory() as scratch:
            pruned, compressed = Path(scratch) / "pruned", Path(scratch) / "compressed"
            secateurs.prune(
                settings.model,
                output=pruned,
                calibration=settings.calibration,
                method=settings.method,
                pattern=f"{sparsity:.0%}",
                samples=settings.samples,
            )
            compress(pruned, compressed)
            model = load(compressed)
            used = sum(module.weight.nbytes for module in block_linears(model).values())
            measure(f"bfloat16, {sparsity:.0%} zeros", model, used, sparsity=sparsity)
    about = environment() | {
        key: value for key, value in vars(settings).items() if key in ("name", "method", "samples", "tokens")
    }
    save(RESULTS / f"bytes_vs_perplexity_{settings.name}.json", about, rows)


if __name__ == "__main__":
    main()
