"""A small real model with text, carried by the package, for a first run without a network."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateurs.device import resolve_device
from secateurs.pattern import parse_pattern
from secateurs.settings import takes

HERE = Path(__file__).parent
MODEL = HERE / "model"
CALIBRATION = HERE / "calibration.txt"  # excerpts of novels that the model was trained on
HELD_OUT = HERE / "held_out.txt"  # an excerpt of one that it never saw
PROMPT = "It was a cold evening, and"
SAMPLES, LENGTH = 64, 256


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Prune the bundled model with every method, and compare. No network, under three minutes."""

    pattern: str = "70%"
    """70%, 2:4..."""

    device: str | None = "cpu"
    """cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit."""
        parse_pattern(self.pattern)
        resolve_device(self.device)


@takes(DemoSettings)
def demo(*, settings: DemoSettings) -> None:
    """Prune the bundled model with every method and print what became of it.

    Raises:
        ValueError: a pattern or a device that cannot be had.
    """
    pattern, device = settings.pattern, settings.device
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers
    from rich.console import Console
    from rich.table import Table

    from secateurs.evaluation import load_model, perplexity
    from secateurs.pruning.methods import METHODS
    from secateurs.pruning.walk import prune
    from secateurs.text import evaluation_tokens, load_tokenizer

    transformers.utils.logging.disable_progress_bar()
    console = Console()
    tokenizer = load_tokenizer(MODEL)
    tokens = evaluation_tokens(HELD_OUT, tokenizer)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    assert isinstance(prompt, Tensor)
    table = Table(title=f"the bundled model at {pattern}, on a novel it never saw")
    for column in ("method", "perplexity", "zeros", "output error", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")

    def measure(folder: Path) -> tuple[str, str]:
        """Perplexity on the held-out text, and how the prompt goes on."""
        model = load_model(folder, device)
        torch.manual_seed(0)
        ids = model.generate(  # type: ignore[operator]
            prompt.to(model.device), max_new_tokens=40, do_sample=True, temperature=0.7, top_k=40
        )
        return f"{perplexity(model, tokens):.1f}", " ".join(str(tokenizer.decode(ids[0])).split())

    continuations = {}
    figure, continuations["dense"] = measure(MODEL)
    table.add_row("dense", figure, "0.0 %", "", "")
    with tempfile.TemporaryDirectory() as scratch:
        for method in METHODS:
            report = prune(
                MODEL,
                output=Path(scratch) / method,
                calibration=CALIBRATION,
                method=method,
                pattern=pattern,
                samples=SAMPLES,
                length=LENGTH,
                device=device,
                progress=True,
            )
            figure, continuations[method] = measure(report.output)
            table.add_row(
                method, figure, f"{report.sparsity:.1%}", f"{report.error:.1%}", f"{report.seconds:.1f}"
            )
    console.print(table)
    for method, text in continuations.items():
        console.print(f"[bold]{method:>9}[/bold]  {text}", highlight=False)
    console.print(
        f"\nPrune your own: secateurs prune MODEL --calibration TEXT --pattern {pattern} --output DIR"
    )
