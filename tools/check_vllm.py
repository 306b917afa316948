"""Compressed folders in vLLM, against transformers with secateurs' own runtime on the same folders.

It needs an environment with vLLM for the CPU, which the ordinary tests do not:

    pip install 'secateurs[vllm]'
    python tools/check_vllm.py [MODEL ...]

Of the bundled Llama, and of each model folder that is given, it writes compressed folders of every kind,
lets both continue some prompts greedily, one by one, and compares the tokens: in float32, in bfloat16, and
in float32 on two ranks (tensor_parallel_size=2), where rows are taken and columns packed anew. Where tokens
part it says how far apart their logits are to transformers: the two round differently on the way, most of
all in bfloat16, and codes are multiplied by tokens that are rounded to eight bits. More than the tolerance
below is an error.
"""

import argparse
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from secateurs.checkpoint.scales import write_scales
from secateurs.runtime import compress
from secateurs.runtime.load import load_model
from secateurs.values import Values

DEMO = Path(__file__).parents[1] / "src" / "secateurs" / "demo" / "model"
TEXTS = (
    "It was a dark and stormy night, and the old man sat down by the fire",
    "The",
    "She had never seen anything like it before, and she said so at once; but her sister, who had travelled, "
    "and who was fond of saying that nothing could surprise her, only laughed, took up her book, and asked",
)
NEW = 24  # tokens
TOLERANCE = {"float32": 0.01, "bfloat16": 0.02}
"""Of the largest logit."""

Form = tuple[float, Values | None]
"""Share of zeros, and the grid that is left."""

INT4 = Values(4, 64, "half")
MIXED: dict[str, Form] = {
    "q_proj": (0.5, None),
    "k_proj": (0.5, INT4),
    "v_proj": (0.0, None),
    "o_proj": (0.6, Values(3, 32, "half")),
    "gate_proj": (0.0, Values(4, 128)),
    "up_proj": (0.5, Values(8, 64)),
    "down_proj": (0.3, Values(2, 128, "half")),
}
TABLE = "embed_tokens"
FORMS: dict[str, dict[str, Form]] = {
    "bf16, 50 %": dict.fromkeys(MIXED, (0.5, None)),
    "int4, 50 %": dict.fromkeys(MIXED, (0.5, INT4)),
    "int4, 0 %": dict.fromkeys(MIXED, (0.0, Values(4, 64))),
    "mixed": MIXED | {TABLE: (0.0, Values(8, 64))},
}
"""By the last part of a module's name; what is not there stays as it is."""


def write_compressed(model: Path, forms: dict[str, Form], folder: Path) -> Path:
    """A compressed folder: each layer's smallest weights zeroed, the rest rounded to nearest."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    scales = {}
    for name, layer in loaded.model.named_modules(prefix="model"):
        if isinstance(layer, nn.Linear | nn.Embedding):
            sparsity, values = forms.get(name.rpartition(".")[2], (0.0, None))
            weight = layer.weight.data
            kept = weight.abs() > weight.abs().float().quantile(sparsity) if sparsity else weight != 0
            if values is not None:
                groups = nn.functional.pad(weight, (0, -weight.shape[1] % values.group))
                largest = groups.unflatten(1, (-1, values.group)).abs().amax(2)
                scale = (largest.float() / values.highest).bfloat16()
                scales[f"{name}.weight"] = (values, scale)
                weight = values.decode(values.encode(weight, scale), scale).bfloat16()
            layer.weight.data = weight * kept if sparsity else weight
    rounded = folder.with_suffix(".dense")
    loaded.save_pretrained(rounded)
    for file in model.glob("*token*"):
        copyfile(file, rounded / file.name)
    if scales:
        write_scales(rounded, scales)
    compress(rounded, output=folder)
    return folder


def tokens_of_vllm(folder: Path, prompts: list[list[int]], dtype: str, ranks: int) -> list[list[int]]:
    """What vLLM continues each prompt with, one after the other; in a process that ends with it."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GB
    if ranks > 1:  # by itself vLLM would have a NUMA node for each
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in cores[:ranks])
    from vllm import LLM, SamplingParams

    model = LLM(
        str(folder),
        dtype=dtype,
        tensor_parallel_size=ranks,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=256,
        max_num_seqs=4,
    )
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    outputs = [model.generate({"prompt_token_ids": ids}, greedy, use_tqdm=False) for ids in prompts]
    model.llm_engine.engine_core.shutdown()  # or this process may wait for the engine's for ever
    return [list(output[0].outputs[0].token_ids) for output in outputs]


def gap(model: Any, prompt: list[int], ours: list[int]) -> tuple[int, float]:
    """How many tokens are those that transformers would have chosen; and where they part, by how much its
    logit is larger, relative to its largest. (NEW, 0) where they never do."""
    ids = torch.tensor([prompt])
    cache = None
    for number, token in enumerate(ours):
        with torch.inference_mode():
            output = model(ids, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[0, -1].float()
        if token != int(logits.argmax()):
            return number, float((logits.max() - logits[token]) / logits.abs().max())
        ids = torch.tensor([[token]])
    return len(ours), 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="*")
    failed = False
    for model in [DEMO, *parser.parse_args().models]:
        tokenizer = AutoTokenizer.from_pretrained(model)
        heads = AutoConfig.from_pretrained(model).num_attention_heads
        prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
        for kind, form in FORMS.items():
            with tempfile.TemporaryDirectory() as scratch:
                folder = write_compressed(model, form, Path(scratch) / "small")
                for dtype, ranks in (("float32", 1), ("bfloat16", 1), ("float32", 2)):
                    if heads % ranks:
                        print(f"{model.name}: vLLM cannot share out {heads} heads among {ranks} ranks")
                        continue
                    # A process of its own, which vLLM leaves in no state to go on.
                    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                        ours = pool.submit(tokens_of_vllm, folder, prompts, dtype, ranks).result()
                    reference = load_model(folder, "cpu", getattr(torch, dtype))
                    gaps = [gap(reference, ids, new) for ids, new in zip(prompts, ours, strict=True)]
                    wrong = max(share for _, share in gaps) > TOLERANCE[dtype]
                    failed |= wrong
                    said = ", ".join(
                        f"{number} of {NEW}" + (f" (then {share:.3%} apart)" if share else "")
                        for number, share in gaps
                    )
                    print(
                        f"{model.name}, {kind}, {dtype}, {ranks} rank(s): equal tokens {said}",
                        "WRONG" if wrong else "",
                        flush=True,
                    )
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
