"""Two models beside each other: what they answer, and token by token how far apart they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from secateurs.checkpoint import resolve
from secateurs.device import resolve_device
from secateurs.evaluation.answers import Answer, answers
from secateurs.report.figures import Part
from secateurs.report.page import check_page, write_page
from secateurs.report.texts import beside, check_prompts, prompts_of, section, shade
from secateurs.settings import OnDevice, takes

PROMPTS = ("Once upon a time", "The capital of France is", "Two and two are")

COLOURS = ((1.0, "reverse red"), (0.5, "red"), (0.1, "yellow"))
"""Of tokens in a terminal, by the least divergence in nats."""


@dataclass(frozen=True)
class CompareSettings(OnDevice):
    """Put two models' answers to the same prompts side by side, and show where and how far they part.

    Example: secateurs compare my-llama my-llama-70 --prompt "It was a dark night" --output page.html
    """

    prompt: Sequence[str] = PROMPTS
    """Texts to go on with."""

    tokens: int = 64
    """At most so many new ones for each prompt."""

    output: str | Path | None = None
    """A page to write as well. An older page is replaced, nothing else."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit."""
        if not self.prompt:
            raise ValueError("nothing to compare: give a prompt")
        check_prompts(prompts_of(self.prompt), self.tokens)
        if self.output is not None:
            check_page(self.output)
        resolve_device(self.device)


@dataclass(frozen=True)
class Compared:
    """Two answers to a prompt."""

    prompt: str
    a: Answer
    b: Answer
    """With the divergence at each of a's tokens, and where it parts."""


@dataclass(frozen=True)
class Comparison:
    """Two models' answers to some prompts."""

    a: str
    b: str
    answers: list[Compared]

    @property
    def divergence(self) -> float:
        """KL(a || b) of what they predict, in nats per token, in the mean over all tokens of a's answers."""
        values = [value for each in self.answers for value in each.b.divergence or ()]
        return sum(values) / len(values)

    def __str__(self) -> str:
        same = sum(each.b.parts is None for each in self.answers)
        return (
            f"{self.b} diverges from {self.a} by {self.divergence:.4f} nats per token; "
            f"{same} of {len(self.answers)} answers are the same"
        )


@takes(CompareSettings)
def compare(a: str | Path, b: str | Path, *, settings: CompareSettings) -> Comparison:
    """Let two models go on from the same prompts, greedily, and measure how far apart they are along the way.

    One of them at a time is in memory.

    Args:
        a: a model folder or a name on the Hugging Face hub, dense or compressed: the reference.
        b: another of the same vocabulary.

    Raises:
        ValueError: vocabularies differ, a model is broken, or was not made for so many tokens.
        FloatingPointError: a prediction is NaN or infinite.
        OSError: the page cannot be written.
    """
    prompts = prompts_of(settings.prompt)
    said = answers([resolve(a), resolve(b)], prompts, settings.tokens, settings.device, one_vocabulary=True)
    compared = [Compared(prompt, *pair) for prompt, pair in zip(prompts, said, strict=True)]
    comparison = Comparison(*_names(a, b), compared)
    if settings.output is not None:
        names = [comparison.a, comparison.b]
        told = [("Divergence", f"{comparison}."), ("Models", f"{a} and {b}.")]
        write_page(Path(settings.output), names, told, [section(names, prompts, said)])
    return comparison


def _names(a: str | Path, b: str | Path) -> tuple[str, str]:
    """As short as tells them apart."""
    one, other = (Path(model).resolve().name for model in (a, b))
    return (one, other) if one != other else (str(a), str(b))


def print_comparison(comparison: Comparison) -> None:
    """The answers side by side on standard output: in a terminal with colours as on the page."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    names = [comparison.a, comparison.b]
    for each in comparison.answers:
        figure = beside(names, each.prompt, [each.a, each.b])
        table = Table(title=Text(figure.title), title_justify="left", expand=True)
        for column in figure.columns:
            table.add_column(Text(column.name), ratio=1, footer=Text(column.note))
        table.show_footer = True
        table.add_row(*(Text.assemble(*map(_styled, column.parts)) for column in figure.columns))
        console.print(table)
    console.print(Text(str(comparison)))
    if console.is_terminal:
        named = [(f" {least}", style) for least, style in reversed(COLOURS)]
        console.print(Text.assemble("tokens that diverge by more than", *named, " nats"))


def _styled(part: Part) -> tuple[str, str]:
    if part.marked:
        return part.text, "bold"
    return part.text, next((style for least, style in COLOURS if part.shade > shade(least)), "")
