"""Perplexity against bytes: a trained model pruned and compressed, beside dense bfloat16, int8 and int4.

Bytes are those of the linear layers in the blocks, the part that pruning and quantisation change. int8 is
torchao's weight-only quantisation (one scale per row). torchao's int4 needs a GPU, so int4 is simulated:
rounded to nearest in groups of 128 with a bfloat16 scale and minimum each, as its GPU kernels store it.

    python benchmarks/bytes_vs_perplexity.py MODEL --calibration FILE --texts FILE ... --name llama
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, PreTrainedModel

import secateurs
from machine import write
from secateurs.evaluation import perplexity
from secateurs.pruning.walk import prune
from secateurs.runtime import SparseLinear, compress
from secateurs.runtime.quantizer import linear_shapes
from secateurs.text import evaluation_tokens, load_tokenizer

GROUP = 128


def block_linears(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The linear layers of the blocks: all that may be compressed but the head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if module is not head and (name in linear_shapes(model) or isinstance(module, SparseLinear))
    }


def to_int4(weight: torch.Tensor) -> int:
    """Rounds a weight (rows, columns) in place; the bytes that it would take."""
    groups = weight.float().split(GROUP, dim=1)
    for group, target in zip(groups, weight.split(GROUP, dim=1), strict=True):
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-9).bfloat16().float()
        low = low.bfloat16().float()
        target.copy_(((group - low) / scale).round().clamp(0, 15) * scale + low)
    return weight.numel() // 2 + len(groups) * len(weight) * 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--name", required=True, help="of the model, in the result")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.6, 0.7, 0.8, 0.9])
    settings = parser.parse_args()
    tokenizer = load_tokenizer(settings.model)
    texts = {Path(text).stem: evaluation_tokens(text, tokenizer) for text in settings.texts}
    rows = []

    def measure(kind: str, model: PreTrainedModel, bytes_used: int, weights: int) -> None:
        figures = {name: perplexity(model, tokens) for name, tokens in texts.items()}
        rows.append({"kind": kind, "bytes": bytes_used, "weights": weights, "perplexity": figures})
        print(f"{kind}: {bytes_used / weights:.3f} bytes per weight, {figures}", flush=True)

    dense = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16)
    weights = sum(module.weight.numel() for module in block_linears(dense).values())
    measure("dense bfloat16", dense, 2 * weights, weights)

    int4 = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16)
    with torch.no_grad():
        used = sum(to_int4(module.weight.data) for module in block_linears(int4).values())
    measure("int4, group 128, simulated", int4, used, weights)

    names = set(block_linears(dense))
    quantize_(dense, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in names)
    used = 0
    for name in names:
        weight = dense.get_submodule(name).weight
        used += sum(getattr(weight, part).nbytes for part in weight.__tensor_flatten__()[0])
    measure("int8, torchao", dense, used, weights)

    for sparsity in settings.sparsities:
        with tempfile.TemporaryDirectory() as scratch:
            pruned, compressed = Path(scratch) / "pruned", Path(scratch) / "compressed"
            prune(
                settings.model,
                output=pruned,
                calibration=settings.calibration,
                method=settings.method,
                pattern=f"{sparsity:.0%}",
                samples=settings.samples,
            )
            compress(pruned, compressed)
            model = AutoModelForCausalLM.from_pretrained(compressed)
            used = sum(module.weight.nbytes for module in block_linears(model).values())
            measure(f"{settings.method} {sparsity:.0%}, compressed", model, used, weights)
    write(
        f"bytes_vs_perplexity_{settings.name}",
        {"method": settings.method, "samples": settings.samples, "secateurs": secateurs.__version__},
        rows,
    )


if __name__ == "__main__":
    main()
