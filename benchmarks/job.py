"""One pruning run in a process of its own: ours, or a peer's.

    python job.py '{"tool": "secateurs", "model": ..., "tokens": ..., "output": ..., ...}'

The other scripts start it by `in_processes`, with the interpreter of the tool's own environment. A tool
reads a model's folder and calibration token ids (a safetensors file, `ids` (samples, length)) and writes the
pruned model's folder. The clock runs from before loading to after saving; the imports come before it. The
last line on stdout is JSON: seconds, phases where the tool can be split, and the most memory held, also by
the imports alone.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import HERE, Record, versions
from timing import in_turns


def in_processes(
    jobs: dict[Any, Record], repetitions: int, pythons: dict[Any, str] | None = None
) -> dict[Any, list[Record]]:
    """Run each named job so many times, turn and turn about, each time in a process of its own."""
    runs = {
        name: partial(_in_process, job, (pythons or {}).get(name, sys.executable))
        for name, job in jobs.items()
    }
    return in_turns(runs, repetitions, warm_up=0)


def _in_process(job: Record, python: str) -> Record:
    """What this file gives for `job`, whose output folder is made anew; its log is shown only if it fails."""
    shutil.rmtree(job["output"], ignore_errors=True)
    command = [python, str(HERE / "job.py"), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """The most memory that this process has held. (`ru_maxrss` would include the parent's, before exec.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])  # type: ignore[index]


def finish_imports(model: str) -> int:
    """Import the model's code, which transformers puts off until the first use: two seconds, 200 MB.

    Returns:
        The most memory held by the imports.
    """
    import transformers

    config = json.loads((Path(model) / "config.json").read_text())
    getattr(transformers, config["architectures"][0])
    return peak_bytes()


def secateurs(
    model: str, output: str, tokens: str | None = None, calibration: str | None = None, **settings: Any
) -> Record:
    """Ours, with its default settings but for those given: by token ids, or other text."""
    from safetensors.torch import load_file

    import secateurs

    imports = finish_imports(model)
    text = load_file(tokens)["ids"] if tokens else calibration
    before = time.process_time()
    report = secateurs.prune(model, output=output, calibration=text, device="cpu", **settings)
    # Those of a run that was interrupted, too.
    matrices = len(report.layers)
    return {
        "seconds": report.seconds,
        "processor_seconds": time.process_time() - before,
        "phases": report.phases,
        "matrices": matrices,
        "import_bytes": imports,
    }


def recover(model: str, output: str, towards: str, **settings: Any) -> Record:
    """Ours, of what was pruned."""
    import secateurs

    imports = finish_imports(model)
    before = time.process_time()
    report = secateurs.recover(model, output=output, towards=towards, device="cpu", **settings)
    return {
        "seconds": report.seconds,
        "processor_seconds": time.process_time() - before,
        "steps": report.steps,
        "before": report.before,
        "after": report.after,
        "import_bytes": imports,
    }


def compress(model: str, output: str) -> Record:
    """Ours, of what was pruned."""
    import secateurs

    imports = finish_imports(model)
    start = time.perf_counter()
    done = secateurs.compress(model, output=output)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "import_bytes": imports,
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        "packed": done.layers,
        "packed_experts": done.experts,
    }


def llmcompressor(
    model: str, tokens: str, output: str, method: str, pattern: str, batch_size: int = 1, group: int = 64
) -> Record:
    """Its defaults: 128 columns a block, dampening 0.01 of the mean diagonal, one decoder layer at a time.
    GPTQ rounds to symmetric int4.

    Weights keep their dtype and are saved uncompressed. Its default batch is one sample.
    """
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import GPTQModifier
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    imports = finish_imports(model)
    start = time.perf_counter()
    ids = load_file(tokens)["ids"]
    samples = [{"input_ids": row} for row in ids]
    settings: Record
    if method == "gptq":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
        settings = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    elif pattern.endswith("%"):
        settings = {"sparsity": float(pattern[:-1]) / 100, "mask_structure": "0:0"}
    else:
        keep, group = map(int, pattern.split(":"))  # its N is how many to prune
        settings = {"sparsity": 1 - keep / group, "mask_structure": f"{group - keep}:{group}"}
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier, "gptq": GPTQModifier}[method]
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model)
    oneshot(
        model=network,
        tokenizer=tokenizer,
        dataset=DataLoader(samples, batch_size=batch_size),  # type: ignore[arg-type]
        recipe=modifier(targets=["Linear"], ignore=["re:.*lm_head"], **settings),
        num_calibration_samples=len(samples),
        max_seq_length=ids.shape[1],
        pipeline="sequential",
        save_compressed=False,
        output_dir=output if method != "gptq" else None,
    )
    if method == "gptq":  # what it makes of the weights, as any program reads them
        plain = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        plain.load_state_dict({name: network.state_dict()[name] for name in plain.state_dict()})
        plain.save_pretrained(output)
    return {"seconds": time.perf_counter() - start, "import_bytes": imports}


def published(model: str, tokens: str, output: str, pattern: str, repository: str) -> Record:
    """The SparseGPT class of a checkout of IST-DASLab/sparsegpt, on the CPU.

    The loop around it is that of its llama.py (the default order: all linears of a block see the dense
    block), which itself needs a transformers of 2023: catch the first block's inputs; per block, one sample
    at a time, accumulate, prune, and run once more for the next block's inputs.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    use_checkout(repository)
    from sparsegpt import SparseGPT

    torch.set_grad_enabled(False)
    imports = finish_imports(model)
    phases = Phases()
    ids = load_file(tokens)["ids"]
    settings = sparsegpt_settings(pattern)

    with phases("load"):
        network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    blocks = network.model.layers
    inps = torch.zeros(*ids.shape, network.config.hidden_size, dtype=network.dtype)
    kwargs: Record = {}

    class Catcher(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block, self.seen = block, 0

        def forward(self, hidden: torch.Tensor, **given: Any) -> None:
            inps[self.seen] = hidden
            self.seen += 1
            kwargs.update(given)
            raise StopIteration

    with phases("forward"):
        blocks[0] = Catcher(blocks[0])
        for row in ids:
            try:
                network(row[None], use_cache=False)
            except StopIteration:
                continue
        blocks[0] = blocks[0].block
    outs = torch.zeros_like(inps)

    for block in blocks:
        linears = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        solvers = {n: SparseGPT(m) for n, m in linears.items()}

        def accumulate(name: str, solvers: Record = solvers) -> Callable[..., None]:
            def hook(_: Any, inp: Any, out: Any) -> None:
                with phases("moments"):
                    solvers[name].add_batch(inp[0], out)

            return hook

        handles = [m.register_forward_hook(accumulate(n)) for n, m in linears.items()]
        with phases("forward"):
            for j in range(len(inps)):
                outs[j] = block(inps[j].unsqueeze(0), **kwargs)[0]
        for handle in handles:
            handle.remove()
        with phases("solve"):
            for solver in solvers.values():
                solver.fasterprune(**settings, percdamp=0.01, blocksize=128)
                solver.free()
        with phases("forward"):
            for j in range(len(inps)):
                outs[j] = block(inps[j].unsqueeze(0), **kwargs)[0]
        inps, outs = outs, inps

    with phases("write"):
        network.save_pretrained(output)
    return {"seconds": phases.total(), "phases": phases.seconds, "import_bytes": imports}


def published_sparsellm(
    model: str, tokens: str, output: str, pattern: str, repository: str, iterations: int = 8
) -> Record:
    """`llama_sparsellm` of a checkout of BaiTheBest/SparseLLM, on the CPU.

    It runs as it stands, on our token ids, but for these changes to its text: the iterations, of which it
    has eight written in; float32 where it has float16, which a CPU is slow at and this model is not in (a
    float32 model fails there); a copy of one weight, which float16 made by its cast; and a block gets all
    that the model passes it, since transformers 5 leaves the rotary embeddings to the model. It prunes a
    block's attention first, and takes X, Y and the first z, p and s from the dense block.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    use_checkout(repository)
    source = (Path(repository) / "model_utils.py").read_text()
    for theirs, ours in {
        "opt_epochs = 8": f"opt_epochs = {iterations}",
        ".half()": ".float()",
        "w.to(dtype=torch.float32)": "w.clone()",
        "torch.float16": "torch.float32",
        'cache["attention_mask"] = kwargs["attention_mask"]': 'cache["attention_mask"] = kwargs',
        "attention_mask=attention_mask": "**attention_mask",
    }.items():
        if theirs not in source:
            raise ValueError(f"{repository}/model_utils.py has no {theirs!r}")
        source = source.replace(theirs, ours)
    code: Record = {}
    exec(source, code)

    imports = finish_imports(model)
    phases = Phases()
    with phases("load"):
        ids = load_file(tokens)["ids"]
        network = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    network.seqlen = ids.shape[1]
    # The defaults of its llama_main.py.
    settings = {"prunen": 0, "prunem": 0, "percdamp": 0.01, "blocksize": 128, "wbits": 16}
    order = {"minlayer": -1, "maxlayer": 1000, "prune_only": "", "invert": False, "true_sequential": False}
    arguments = {**settings, **order, **sparsegpt_settings(pattern), "nsamples": len(ids)}
    with phases("prune"):
        batches = [(row[None],) for row in ids]
        code["llama_sparsellm"](network, batches, torch.device("cpu"), SimpleNamespace(**arguments))
    with phases("write"):
        network.save_pretrained(output)
    return {"seconds": phases.total(), "phases": phases.seconds, "import_bytes": imports}


def use_checkout(repository: str) -> None:
    """Import from a checkout of code written for a GPU, on the CPU."""
    import torch

    # It calls both unconditionally.
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda: None  # type: ignore[assignment]
    sys.path.insert(0, repository)


def sparsegpt_settings(pattern: str) -> Record:
    """Our pattern in the words of the published SparseGPT, whose N is how many to prune."""
    if pattern.endswith("%"):
        return {"sparsity": float(pattern[:-1]) / 100}
    keep, group = map(int, pattern.split(":"))
    return {"sparsity": 0.0, "prunen": group - keep, "prunem": group}


class Phases:
    """Seconds by name; time inside an inner phase is not counted to the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner = 0.0
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer, self.inner = self.inner, 0.0
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self.inner
        self.inner = outer + elapsed

    def total(self) -> float:
        return time.perf_counter() - self.start


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    tools: dict[str, Callable[..., Record]] = {
        "secateurs": secateurs,
        "recover": recover,
        "compress": compress,
        "llmcompressor": llmcompressor,
        "published": published,
        "published_sparsellm": published_sparsellm,
    }
    result = tools[job.pop("tool")](**job)
    about = {"peak_bytes": peak_bytes(), "processor_seconds": time.process_time(), "versions": versions()}
    print("\n" + json.dumps({**about, **result}))
