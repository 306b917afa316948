"""Where the time of a training step goes, plain and sparse: of a model folder, or a Llama of random weights.

Two copies of one model train in turns, one plainly and one at a constant omission rate, so that a busy
machine slows both alike; figures are medians, speed-ups medians of the paired ratios. With one thread on a
CPU seconds are the processor's. On a GPU products are bfloat16 by autocast, and AdamW is the fused one. The
phases of a step, which make up the whole:

- forward, backward: of all blocks. What their FLOPs allow is 1 / (1 - rate).
- head: all between the end of the blocks' forward and the start of their backward pass: final norm, logits
  and loss, forward and backward; never omitted.
- optimiser: clipping, AdamW's step and zeroing; of the sparse model only of what runs.
- rest: the embedding, forward and backward.

And what comes once in `probe_every` steps:

- probe: measuring importance on a dense pass.
- gather: changing what runs: putting the kept rows first and taking the state along.

    taskset -c 0 python benchmarks/sat_step_time.py
    taskset -c 0 python benchmarks/sat_step_time.py --model SmolLM2-135M-Instruct --rates 0.5 0.75
"""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from common import RESULTS, Record, arguments, environment, print_table, save
from secateurs.training.importance import measure
from secateurs.training.ladder import Constant
from secateurs.training.omission import Omission
from secateurs.training.sparse import PROBE_EVERY, SparseTraining
from timing import in_turns, medians, speedup

PHASES = ("forward", "backward", "head", "optimiser", "rest")


class Side:
    """One of the two models, and its step by phases."""

    def __init__(self, model: PreTrainedModel, rate: float, tokens: Tensor, *, compiled: bool) -> None:
        self.device = tokens.device
        self.model: Any = model.to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=self.device.type == "cuda")
        self.tokens = tokens
        self.sparse = None
        if rate:
            self.sparse = SparseTraining(schedule=Constant(rate, 10**6), probe_every=10**6)
            self.sparse.attach(self.model, self.optimizer, total_steps=10**6)
        self.seconds: Record = {}
        self._last = 0.0
        blocks = (self.sparse.omission if self.sparse else Omission(self.model, in_place=True)).blocks
        if compiled:
            for block in blocks:
                block.module.forward = torch.compile(block.module.forward)
        blocks[0].module.register_forward_pre_hook(self._enter)
        blocks[-1].module.register_forward_hook(self._leave)

    def now(self) -> float:
        """Seconds, when all is done that was begun."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        one_thread = self.device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if one_thread else time.perf_counter()

    def _note(self, phase: str) -> None:
        """What has run since the last note belongs to a phase."""
        now = self.now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def _enter(self, _: Any, args: tuple[Any, ...]) -> None:
        if args[0].requires_grad:
            self._note("rest")
            args[0].register_hook(lambda _: self._note("backward"))

    def _leave(self, _: Any, args: tuple[Any, ...], output: Any) -> None:
        if output.requires_grad:
            self._note("forward")
            output.register_hook(lambda _: self._note("head"))

    def autocast(self) -> torch.autocast:
        """As training does on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def step(self) -> Record:
        """Seconds of each phase of a step, without probe and gather."""
        self._note("rest")
        self.seconds = {}
        with self.autocast():
            loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        self._note("rest")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.sparse is not None:
            self.sparse.step()
        self._note("optimiser")
        return {**self.seconds, "step": sum(self.seconds.values())}

    def probe(self) -> None:
        assert self.sparse is not None
        with self.autocast():
            measure(self.model, self.sparse.omission, "weighted", (), {"input_ids": self.tokens})


def memory_of_a_step(side: Side) -> int | None:
    """What a step takes on a GPU at its peak, beside weights and optimiser state."""
    if side.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side.step()
    return torch.cuda.max_memory_allocated() - before


def compare(
    make: Callable[[], PreTrainedModel], rate: float, tokens: Tensor, repetitions: int, compiled: bool
) -> Record:
    """Both sides of every phase, in turns."""
    on_gpu = tokens.is_cuda
    sides = {
        name: Side(make(), omitted, tokens, compiled=compiled)
        for name, omitted in (("plain", 0.0), ("sparse", rate))
    }
    for side in sides.values():  # make the optimiser's state, and choose what is omitted
        side.step()
    sparse = sides["sparse"]
    sat = sparse.sparse
    assert sat is not None
    steps = in_turns({name: side.step for name, side in sides.items()}, repetitions)
    memory = {name: memory_of_a_step(side) for name, side in sides.items()}
    probes, gathers = [], []
    for _ in range(repetitions):
        # A change of the set by hand: whole, measured, another half chosen, small again.
        start = sparse.now()
        sat.whole()
        whole = sparse.now()
        sparse.probe()
        measured = sparse.now()
        with torch.no_grad():
            for scores in sat.scores or []:
                for kind in scores:
                    scores[kind] = torch.rand_like(scores[kind])
        sat._choose(sat._keep(sat.rates), False)
        sat._use()
        sat.omission.engage()
        probes.append(measured - whole)
        gathers.append(sparse.now() - measured + whole - start)
        sat._ready = True
        sparse.step()
    record: Record = {"rate": rate, "kept_channels": int(sat.kept[0]["mlp"].sum())}  # type: ignore[union-attr]
    for phase in ("step", *PHASES):
        pairs = {name: [seconds[phase] for seconds in found] for name, found in steps.items()}
        record[phase] = {
            **{f"{name}_seconds": value for name, value in medians(pairs).items()},
            "speed_up": speedup(pairs, "sparse", "plain"),
        }
    if on_gpu:
        record["step"] |= {f"{name}_bytes": held for name, held in memory.items()}
    both = {
        name: [seconds["forward"] + seconds["backward"] for seconds in found] for name, found in steps.items()
    }
    record["blocks"] = {"allowed": 1 / (1 - rate), "speed_up": speedup(both, "sparse", "plain")}
    record["blocks"]["share_of_allowed"] = record["blocks"]["speed_up"] * (1 - rate)
    record["probe_seconds"], record["gather_seconds"] = median(probes), median(gathers)
    extra = (record["probe_seconds"] + record["gather_seconds"]) / PROBE_EVERY
    record["step"]["speed_up_with_probe_and_gather"] = record["step"]["plain_seconds"] / (
        record["step"]["plain_seconds"] / record["step"]["speed_up"] + extra
    )
    sat.detach()
    return record


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="a folder, instead of random weights")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.25, 0.5, 0.75])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, help="as many as heads by default")
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS / "sat_step_time.json")
    parser.add_argument("--compile", action="store_true", help="each block, by torch.compile")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch._dynamo.config.recompile_limit = 8 * settings.blocks  # blocks are of one code

    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        if settings.model is None:
            return LlamaForCausalLM(config)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
        return model

    config: Any = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.channels,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.length,
    )
    if settings.model is not None:
        config = AutoConfig.from_pretrained(settings.model)
    torch.manual_seed(1)
    tokens = torch.randint(config.vocab_size, (settings.batch_size, settings.length)).to(settings.device)
    about = {
        **environment(),
        "device": settings.device,
        "threads": settings.threads,
        "model": {
            "folder": settings.model and settings.model.name,
            **{
                key: getattr(config, key)
                for key in ("hidden_size", "intermediate_size", "vocab_size", "num_key_value_heads")
            },
            "blocks": config.num_hidden_layers,
            "heads": config.num_attention_heads,
        },
        "batch_size": settings.batch_size,
        "length": settings.length,
        "compiled": settings.compile,
        "probe_every": PROBE_EVERY,
        "repetitions": settings.repetitions,
    }
    rows = []
    for rate in settings.rates:
        rows.append(compare(make, rate, tokens, settings.repetitions, settings.compile))
        save(settings.results, about, rows)
        gc.collect()
    print_table(
        [
            "rate",
            *(f"{phase}: plain, sparse (ms), speed-up" for phase in ("step", *PHASES)),
            "blocks: of allowed",
            "probe (ms)",
            "gather (ms)",
            "step with both every 20",
        ],
        [
            [
                row["rate"],
                *(
                    f"{1e3 * row[phase]['plain_seconds']:.0f}, {1e3 * row[phase]['sparse_seconds']:.0f}, "
                    f"{row[phase]['speed_up']:.2f}"
                    for phase in ("step", *PHASES)
                ),
                row["blocks"]["share_of_allowed"],
                1e3 * row["probe_seconds"],
                1e3 * row["gather_seconds"],
                row["step"]["speed_up_with_probe_and_gather"],
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
