"""A page of everything that is recorded of some models: one file, which opens from a disk."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from secateurs.checkpoint import resolve
from secateurs.checkpoint.writing import write_text
from secateurs.report.figures import Code, Facts, Figure, Group, Section
from secateurs.report.layers import convergence, layers
from secateurs.report.quality import quality
from secateurs.report.sources import Source, read_sources
from secateurs.report.summary import summary
from secateurs.report.texts import check_prompts, prompts_of, texts
from secateurs.report.training import activity, training
from secateurs.report.weights import masks, weights
from secateurs.settings import OnDevice, takes

HERE = Path(__file__).parent

GENERATOR = b'<meta name="generator" content="Secateurs">'
"""In the first lines of every page."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings(OnDevice):
    """Make a page to look at of what is recorded in output folders: quality, layers, weights, training.

    One HTML file without a network: for any folders that prune, recover, train, sweep, profile --output or
    eval --output made.

    Example: secateurs report my-llama-70 my-llama-70-figures --output page.html
    """

    output: str | Path
    """The page to write. An older page is replaced, nothing else."""

    against: str | Path | None = None
    """The dense model that all were made from. By default the one that a folder's record names, if it is
    there."""

    prompt: tuple[str, ...] = ()
    """Texts that the dense and the folders' models go on with, side by side."""

    tokens: int = 64
    """New ones for each prompt."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit."""
        check_page(self.output)
        check_prompts(prompts_of(self.prompt), self.tokens)


@takes(ReportSettings)
def report(folders: Sequence[str | Path], *, settings: ReportSettings) -> Path:
    """Write a page about some output folders.

    Sections of which nothing is recorded are left out. Weights are read where a folder has some and the dense
    model is there; all else is from the records.

    Args:
        folders: that prune, recover, train, sweep, `profile --output` or `eval --output` made.

    Returns:
        The page.

    Raises:
        ValueError: a folder holds no record, a model is broken, or `against` is of another shape.
        OSError: the page cannot be written.
    """
    sources = read_sources([folders] if isinstance(folders, str | Path) else folders)
    against = None if settings.against is None else resolve(settings.against)
    dense = against or next((source.made_from for source in sources if source.made_from), None)
    made = {source.name: source.folder for source in sources if source.has_model}
    models = {"dense" if "dense" not in made else str(dense): dense} if dense else {}
    models |= made
    # First, for what may be wrong with a prompt.
    said = texts(models, prompts_of(settings.prompt), settings.tokens, settings.device)
    found = [
        quality(sources),
        layers(sources),
        convergence(sources),
        weights(sources, against),
        masks(sources),
        training(sources),
        activity(sources),
        said,
        settings_of(sources),
    ]
    names = [source.name for source in sources if not source.is_cell]
    return write_page(Path(settings.output), names, summary(sources), found)


def check_page(output: str | Path) -> None:
    """Raises ValueError if a page cannot be written there, or not without losing something else."""
    if Path(output).is_dir():
        raise ValueError(f"'{output}' is a folder: give a file, such as page.html")
    if Path(output).exists() and not _is_page(Path(output)):
        raise ValueError(f"'{output}' exists and is no page of a report: give another file")
    above = next(place for place in Path(output).resolve().parents if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"'{output}' cannot be made in '{above}': give another file")


def _is_page(file: Path) -> bool:
    with file.open("rb") as opened:
        return GENERATOR in opened.read(1000)


def write_page(
    output: Path, names: Sequence[str], told: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> Path:
    """Write a page of those sections that hold something; what comes from files and models is escaped.

    Args:
        output: the file.
        names: what the page is about.
        told: names and what is said of them, in the summary.
        sections: in the page's order.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Ours: no `</style>` or `</script>` is in them.
    style, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    title = " and ".join(names if len(names) < 3 else [names[0], f"{len(names) - 1} more"])
    page = environment.get_template("page.html").render(
        title=title,
        names=names,
        summary=told,
        sections=[section for section in sections if not section.is_empty],
        style=style,
        script=script,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    return output


def settings_of(sources: Sequence[Source]) -> Section:
    """What was chosen, and by which versions, to do it again."""
    groups = []
    for source in sources:
        told: dict[str, Any] = {}
        versions: dict[str, Any] = dict(source.record.get("versions", {}))
        figures: list[Figure] = []
        if source.pruning is not None:
            told = source.pruning.settings
            figures.append(Facts("Pruning", source.pruning.facts[:-1]))
            phases = [(name, f"{seconds:.1f} s") for name, seconds in source.pruning.phases.items()]
            figures.append(Facts("Time", [*phases, ("in all", f"{source.pruning.seconds:.1f} s")]))
        if source.trained is not None:
            told = source.trained.settings
            versions = getattr(source.trained, "versions", versions)
        told = told or source.record.get("settings", {})
        if versions:
            figures.append(Facts("Versions", [(name, str(number)) for name, number in versions.items()]))
        if told:
            figures.append(Code("Settings", json.dumps(told, indent=2, ensure_ascii=False)))
        if figures:
            groups.append(Group(source.name, figures))
    return Section("settings", "To do it again", "Settings with defaults filled in, and versions.", groups)
