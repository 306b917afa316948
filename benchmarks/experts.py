"""Perplexity of a small pruned mixture of experts, by what each expert is calibrated on.

An expert is pruned by the second moment H of what it is given. Of a calibration text that may be

- routed: the tokens that the router sends it, and those alone;
- all: every token (llm-compressor's default for mixtures of experts);
- shrunk: H = (c H_routed + k H_all) / (c + k) for its c tokens, k as many as a matrix has inputs;
- ours: what the library does, its tokens and as many more as it has inputs, drawn from all.

The model is trained first (`small_moe`), unless the cache has it; the texts that are measured are left out
of its books. Calibrated on few tokens, most experts see fewer than they have inputs; on more, all see enough.
Every combination is pruned and saved, loaded back by transformers, and measured on windows all over each
text: perplexity, and the divergence of the dense model's predictions from the pruned one's. One that is in
the results is not repeated. The table shows the mean over the seeds, which say where in the calibration text
the sequences are drawn, and beside a perplexity its least and most.

    python benchmarks/experts.py --cache ../cache --books ../data/books \
        --calibration ../data/books/Bleak-House_1023.txt \
        --texts ../data/wikitext-2/test.txt ../data/books/Dracula_345.txt

Dropping whole experts is measured beside it, those of the lowest scores (ours) or any (chance).

`--kinds` takes others, too: "shrunk, k / 4" and "ours, 4 x drawn", four times as many as a matrix has inputs.
`--table` prints what is in the results.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

import torch
import tyro
from torch import Tensor
from transformers import AutoTokenizer

import secateurs
from common import RESULTS, Record, environment, load, print_table, save
from real import spread
from scores import divergences, perplexities
from secateurs.pruning import reap
from secateurs.pruning.block import local
from secateurs.pruning.block.block import Advance, Block, Clock
from secateurs.pruning.block.experts import Expert, Routed
from secateurs.pruning.record import BlockReport
from secateurs.pruning.solvers.statistics import Statistics
from secateurs.text import calibration_blocks, evaluation_tokens
from small_moe import BATCH, LENGTH, STEPS, small_moe

DIVERGENCE_WINDOWS = 16
"""Of each text; the dense model runs too."""


class RoutedOnly(Routed):
    """The library's draw is left to those that no token reaches."""

    def tokens(self, expert: int) -> list[Tensor]:
        return [tokens for tokens in self.own[expert] if len(tokens)] or [self.drawn]


class AllToAll(Routed):
    @cached_property
    def everything(self) -> Tensor:
        """All tokens, (tokens, in), each of which goes to as many experts as any other."""
        copies = torch.cat([tokens for own in self.own for tokens in own])
        tokens, counts = copies.unique(dim=0, return_counts=True)
        return tokens.repeat_interleave(counts // counts.min(), dim=0)

    def tokens(self, expert: int) -> list[Tensor]:
        return [self.everything]


class Shrunk(AllToAll):
    """What `prune_shrunk` takes: an expert's own tokens, and all."""

    share = 1.0
    """k in units of a matrix's inputs."""

    def tokens(self, expert: int) -> list[Tensor]:
        return [torch.cat([self.everything[:0], *self.own[expert]]), self.everything]


class ShrunkLess(Shrunk):
    share = 0.25


class DrawnMore(AllToAll):
    """As ours, but four times as many are drawn."""

    def tokens(self, expert: int) -> list[Tensor]:
        everything, count = self.everything, 4 * len(self.drawn)
        chosen = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))[:count]
        return [*self.own[expert], everything[chosen]]


def prune_shrunk(
    share: float,
    self: local.Local,
    block: Block,
    expert: Expert,
    given: list[Tensor],
    clock: Clock,
    advance: Advance,
    report: BlockReport,
) -> None:
    """`Local.prune_expert` by shrunk second moments, in closed form."""
    channels = self._channels(block, expert, given)  # of the dense expert, as the library's order has it
    for group, (own, everything) in ((expert.first, given), ((expert.down,), channels)):
        count, width = len(own), group[0].shape[1]
        routed, of_all = Statistics.from_inputs(own), Statistics.from_inputs(everything)
        mixed, pseudo = Statistics(width), share * width
        mixed.tokens = count + round(pseudo)
        mixed.mean = (count * routed.mean + pseudo * of_all.mean) / (count + pseudo)
        mixed._moment = (count * routed.moment + pseudo * of_all.moment) / (count + pseudo)
        self.prune_group(block, group, mixed, clock, advance, report)


KINDS: dict[str, type[Routed]] = {
    "routed": RoutedOnly,
    "all": AllToAll,
    "shrunk": Shrunk,
    "shrunk, k / 4": ShrunkLess,
    "ours, 4 x drawn": DrawnMore,
}
"""What experts are given, where that is not what the library gives them."""


def by_chance(best: Callable[[Tensor, int, int], list[int]]) -> Callable[[Tensor, int, int], list[int]]:
    """Experts kept whatever their scores."""
    generator = torch.Generator().manual_seed(0)

    def chosen(scores: Tensor, count: int, groups: int) -> list[int]:
        return best(torch.rand(len(scores), generator=generator), count, groups)

    return chosen


@contextmanager
def calibrated_on(kind: str) -> Iterator[None]:
    """Within, local methods prune experts by other tokens, or others are kept: the library is patched."""
    if kind == "ours":
        yield
        return
    if kind == "chance":
        with patch.object(reap, "best", by_chance(reap.best)):
            yield
        return
    given, route = KINDS[kind], local.route

    def routed(*arguments: object) -> Routed:
        return given(**vars(route(*arguments)))  # type: ignore[arg-type]

    with patch.object(local, "route", routed):
        if not issubclass(given, Shrunk):
            yield
            return

        def prune_expert(*arguments: object) -> None:
            prune_shrunk(given.share, *arguments)  # type: ignore[attr-defined, arg-type]

        with patch.object(local.Local, "prune_expert", prune_expert):
            yield


Cell = tuple[str, str, int, int | None]  # method, kind, samples, seed
DENSE: Cell = ("dense", "", 0, None)

METHODS: dict[str, Record] = {
    "sparsegpt": {"method": "sparsegpt"},
    "wanda": {"method": "wanda"},
    "sparsellm": {"method": "sparsellm"},
    "12 of 16 experts": {"experts": "75%", "pattern": "0%"},
    "8 of 16 experts": {"experts": "50%", "pattern": "0%"},
    "12 of 16, sparsegpt 60%": {"experts": "75%", "pattern": "60%", "method": "sparsegpt"},
}
"""What `secateurs.prune` is given."""


def grid(kinds: tuple[str, ...], samples: tuple[int, ...], seeds: tuple[int, ...]) -> list[Cell]:
    """The dense model, then each seed for all. Only local methods are patched: the others are ours alone.
    Where experts are dropped, what that chooses by is ours, or chance."""

    def own(method: str) -> tuple[str, ...]:
        if "experts" in METHODS[method]:
            return ("ours", "chance")
        return kinds if method in LOCAL else ("ours",)

    pairs = [(method, kind) for method in METHODS for kind in own(method)]
    return [DENSE, *((*pair, count, seed) for seed, count, pair in product(seeds, samples, pairs))]


LOCAL = ("sparsegpt", "wanda")


def measure(
    model: Path,
    cell: Cell,
    draw: Callable[[int, int], Tensor],
    texts: dict[str, Tensor],
    settings: Record,
) -> Record:
    """Prune, save, load and evaluate one cell of the grid."""
    length = settings["length"]
    if cell == DENSE:
        return {"perplexity": perplexities(model, texts, length)}
    method, kind, samples, seed = cell
    assert seed is not None
    with tempfile.TemporaryDirectory() as temporary, calibrated_on(kind):
        output = Path(temporary) / "pruned"
        report = secateurs.prune(
            model,
            output=output,
            calibration=draw(samples, seed),
            device="cpu",
            **{"pattern": settings["pattern"], **METHODS[method]},
        )
        counts = [count for experts in report.experts for count in experts.tokens]
        return {
            "perplexity": perplexities(output, texts, length),
            "divergence": divergences(model, output, texts, length, DIVERGENCE_WINDOWS),
            "tokens_per_expert": spread_of(counts),
            "sparsity": report.sparsity,
            "seconds": report.seconds,
        }


def spread_of(counts: list[int]) -> Record | None:
    """None where nothing but whole experts was pruned."""
    if not counts:
        return None
    return {"least": min(counts), "median": median(counts), "most": max(counts)}


def print_results(rows: list[Record]) -> None:
    texts = list(rows[0]["perplexity"])
    groups: dict[tuple[int, str, str], list[Record]] = {}
    for row in rows:
        groups.setdefault((row["samples"], row["method"], row["kind"]), []).append(row)
    table = []
    for (samples, method, kind), own in sorted(groups.items(), key=lambda item: item[0][0]):
        cells: list[object] = [samples or "", method, kind]
        for text in texts:
            scores = [row["perplexity"][text] for row in own]
            span = f" ({min(scores):.1f} to {max(scores):.1f})" if len(scores) > 1 else ""
            cells.append(f"{mean(scores):.2f}{span}")
        if samples:
            cells += [f"{mean(row['divergence'][text] for row in own):.3f}" for text in texts]
            counts = [row["tokens_per_expert"] for row in own if row["tokens_per_expert"]]
            cells.append(min((count["least"] for count in counts), default=""))
            cells += [f"{mean(count['median'] for count in counts):.0f}" if counts else "", len(own)]
        else:
            cells += [""] * (len(texts) + 3)
        table.append(cells)
    header = ["samples", "method", "calibrated on", *texts, *(f"KL {text}" for text in texts)]
    print_table([*header, "least tokens", "median tokens", "seeds"], table)


def main(
    cache: Path | None = None,
    books: Path | None = None,
    calibration: Path | None = None,
    texts: tuple[Path, ...] = (),
    pattern: str = "70%",
    kinds: tuple[str, ...] = ("routed", "shrunk", "ours", "all"),
    samples: tuple[int, ...] = (2, 64),
    seeds: tuple[int, ...] = (0, 1, 2),
    length: int = 256,
    windows: int = 64,
    table: bool = False,
    results: Path = RESULTS / "experts.json",
) -> None:
    """See above.

    Args:
        cache: keeps the trained model.
        books: a folder of .txt files to train it on.
        calibration: a text that no other is measured on.
        texts: to measure on.
        samples: sequences to calibrate on: few, and enough.
        windows: of each text, evenly from beginning to end.
    """
    if table:
        print_results(load(results))
        return
    if cache is None or books is None or calibration is None or not texts:
        raise SystemExit("give --cache, --books, --calibration and --texts")
    if calibration in texts:
        raise SystemExit(f"{calibration} is to be measured on: calibrate on another text")
    settings = {"calibration": calibration.name, "texts": [text.name for text in texts]}
    settings |= {"pattern": pattern, "length": length, "windows": windows}
    settings["divergence_windows"] = DIVERGENCE_WINDOWS
    about = {**environment(), **settings, "trained_on_tokens": STEPS * BATCH * LENGTH}
    rows = load(results, settings)
    model = small_moe(cache / "small-moe", books, without={text.name for text in texts})
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = {text.stem: spread(evaluation_tokens(text, tokenizer), length, windows) for text in texts}

    def draw(count: int, seed: int) -> Tensor:
        return calibration_blocks(calibration, tokenizer, samples=count, length=length, seed=seed)

    names = ("method", "kind", "samples", "seed")
    done = {tuple(row[name] for name in names) for row in rows}
    for cell in grid(kinds, samples, seeds):
        if cell in done:
            continue
        row = dict(zip(names, cell, strict=True))
        rows.append({**row, **measure(model, cell, draw, tokens, settings), "revision": about["revision"]})
        save(results, about, rows)
        scores = (f"{text} {score:.2f}" for text, score in rows[-1]["perplexity"].items())
        print(*cell, *scores, flush=True)
    print_results(rows)


if __name__ == "__main__":
    tyro.cli(main)
