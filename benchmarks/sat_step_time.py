"""What a sparse training step takes beside a plain one, whole and in parts, on a Llama of random weights.

Two copies of one model train in turns, one plainly and one at a constant omission rate, so that a busy
machine slows both alike; figures are medians, speed-ups medians of the paired ratios. On a GPU products are
bfloat16 by autocast, and AdamW is the fused one. The parts:

- forward, backward and optimiser are those of a step; the last is clipping and AdamW's step, of the sparse
  model only on what runs.
- blocks: forward and backward of all blocks. What their FLOPs allow is 1 / (1 - rate).
- head: embedding, final norm, logits and loss, forward and backward; never omitted.
- probe: measuring importance on a dense pass, every `probe_every` steps.
- gather: changing what runs: putting the kept rows first and taking the state along; as often.

    taskset -c 0 python benchmarks/sat_step_time.py
"""

import gc
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from common import RESULTS, Record, arguments, environment, print_table, save
from secateurs.training.importance import measure
from secateurs.training.ladder import Constant
from secateurs.training.sparse import SparseTraining
from timing import in_turns, medians, speedup, timed

PROBE_EVERY = 20


class Side:
    """One of the two models, and its step in parts."""

    def __init__(self, config: LlamaConfig, rate: float, tokens: Tensor) -> None:
        torch.manual_seed(0)
        self.device = tokens.device
        with self.device:
            self.model = LlamaForCausalLM(config).train()
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=fused)
        self.tokens = tokens
        self.sparse = None
        if rate:
            self.sparse = SparseTraining(
                schedule=Constant(rate, 10**6), importance="weighted", probe_every=10**6
            )
            self.sparse.attach(self.model, self.optimizer, total_steps=10**6)
        self.hidden = torch.randn(*tokens.shape, config.hidden_size, device=self.device)
        self.loss: Tensor | None = None

    def autocast(self) -> torch.autocast:
        """As training does on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def step(self) -> None:
        """A whole step, without probe and gather."""
        self.forward()
        self.backward()
        self.optimise()

    def forward(self) -> None:
        with self.autocast():
            self.loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss

    def backward(self) -> None:
        assert self.loss is not None
        self.loss.backward()

    def optimise(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.sparse is not None:
            self.sparse.step()

    def clear(self) -> None:
        self.loss = None
        self.optimizer.zero_grad()

    def until_backward(self) -> None:
        self.clear()
        self.forward()

    def until_optimise(self) -> None:
        self.until_backward()
        self.backward()

    def blocks(self) -> None:
        """All blocks, forward and backward, on a given input and towards a given gradient."""
        states = self.hidden.clone().requires_grad_()
        positions = torch.arange(states.shape[1], device=self.device)[None]
        with self.autocast():
            rotary = self.model.model.rotary_emb(states, positions)
            output: Tensor = states
            for block in self.model.model.layers:
                output = block(
                    output, position_embeddings=rotary, attention_mask=None, position_ids=positions
                )
        output.backward(self.hidden)

    def head(self) -> None:
        """All but the blocks, forward and backward."""
        with self.autocast():
            states = self.model.model.norm(self.model.model.embed_tokens(self.tokens))
            logits = self.model.lm_head(states)
            loss = self.model.loss_function(logits, self.tokens, vocab_size=self.model.config.vocab_size)
        loss.backward()

    def probe(self) -> None:
        assert self.sparse is not None
        with self.autocast():
            measure(self.model, self.sparse.omission, "weighted", (), {"input_ids": self.tokens})


PARTS = {
    "step": (Side.step, Side.clear),
    "forward": (Side.forward, Side.clear),
    "backward": (Side.backward, Side.until_backward),
    "optimiser": (Side.optimise, Side.until_optimise),
    "blocks": (Side.blocks, Side.clear),
    "head": (Side.head, Side.clear),
}
"""Each with what has to be done before it."""


def memory_of_a_step(side: Side) -> int | None:
    """What a step takes on a GPU at its peak, beside weights and optimiser state."""
    if side.device.type != "cuda":
        return None
    side.clear()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side.step()
    return torch.cuda.max_memory_allocated() - before


def compare(config: LlamaConfig, rate: float, tokens: Tensor, repetitions: int) -> Record:
    """Both sides of every part, in turns."""
    on_gpu = tokens.is_cuda
    sides = {"plain": Side(config, 0.0, tokens), "sparse": Side(config, rate, tokens)}
    for side in sides.values():  # make the optimiser's state, and choose what is omitted
        side.step()
        side.clear()
    sparse = sides["sparse"]
    sat = sparse.sparse
    assert sat is not None
    times = {}
    for part, (run, before) in PARTS.items():
        runs = {
            name: timed(partial(run, side), on_gpu=on_gpu, before=partial(before, side))
            for name, side in sides.items()
        }
        times[part] = in_turns(runs, repetitions)
    memory = {name: memory_of_a_step(side) for name, side in sides.items()}
    probes, gathers = [], []
    for _ in range(repetitions):
        # A change of the set by hand: whole, measured, another half chosen, small again.
        undo = timed(sat.whole, on_gpu=on_gpu)()
        probes.append(timed(sparse.probe, on_gpu=on_gpu)())
        with torch.no_grad():
            for scores in sat.scores or []:
                for kind in scores:
                    scores[kind] = torch.rand_like(scores[kind])
        choose = timed(
            lambda: (sat._choose(sat._keep(sat.rates), False), sat._use(), sat.omission.engage()),
            on_gpu=on_gpu,
        )
        gathers.append(undo + choose())
        sat._ready = True
        sparse.clear()
        sparse.step()
    sparse.clear()
    record: Record = {"rate": rate, "kept_channels": int(sat.kept[0]["mlp"].sum())}  # type: ignore[union-attr]
    for part, pairs in times.items():
        record[part] = {
            **{f"{name}_seconds": value for name, value in medians(pairs).items()},
            "speed_up": speedup(pairs, "sparse", "plain"),
        }
    if on_gpu:
        record["step"] |= {f"{name}_bytes": held for name, held in memory.items()}
    record["blocks"]["allowed"] = 1 / (1 - rate)
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
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.channels,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.length,
    )
    torch.manual_seed(1)
    tokens = torch.randint(settings.vocabulary, (settings.batch_size, settings.length)).to(settings.device)
    about = {
        **environment(),
        "device": settings.device,
        "threads": settings.threads,
        "model": {
            key: getattr(config, key)
            for key in ("hidden_size", "intermediate_size", "vocab_size", "num_key_value_heads")
        }
        | {"blocks": settings.blocks, "heads": settings.heads},
        "batch_size": settings.batch_size,
        "length": settings.length,
        "probe_every": PROBE_EVERY,
        "repetitions": settings.repetitions,
    }
    rows = []
    for rate in settings.rates:
        rows.append(compare(config, rate, tokens, settings.repetitions))
        save(settings.results, about, rows)
        gc.collect()
    print_table(
        [
            "rate",
            *(f"{part}: plain, sparse (ms), speed-up" for part in PARTS),
            "blocks: of allowed",
            "probe (ms)",
            "gather (ms)",
            "step with both every 20",
        ],
        [
            [
                row["rate"],
                *(
                    f"{1e3 * row[part]['plain_seconds']:.0f}, {1e3 * row[part]['sparse_seconds']:.0f}, "
                    f"{row[part]['speed_up']:.2f}"
                    for part in PARTS
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
