"""How many heads and channels of a pretrained model are barely active: the premise of sparse training.

A channel's activation is its entry in the input of `down`, a head's the norm of its slice of the input of
`o`. That few of them are large at any token is known as the lazy neuron phenomenon (arXiv 2210.06313); with
ReLU the others are exactly zero (2310.04564), with a smooth activation merely small, so that a threshold
takes the place of zero (2404.08763), and heads are compared by their norms (2310.17157). Sparsity-Accelerated
Training (2406.01392) omits the same neurons for a whole batch, so what a fixed set keeps is shown as well.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateurs.anatomy.families import family_of
from secateurs.checkpoint import Checkpoint, resolve, write_json
from secateurs.device import resolve_device
from secateurs.runtime.load import load_model
from secateurs.settings import OfText, OnDevice, takes
from secateurs.text import evaluation_tokens, load_tokenizer
from secateurs.training.model import read_config, sequence_length

if TYPE_CHECKING:
    from rich.table import Table

SMALL = 0.1  # of the largest activation in the layer at the same token: the neuron is barely active
QUIET = 0.5  # of the layer's mean activation: the neuron is quiet over the whole text
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Activity:
    """How active the heads, or the channels, of one block are on a text."""

    barely_active: float
    """Share of activations (token, neuron) below a tenth of the largest at that token."""
    quiet: float
    """Share of neurons whose mean activation is below half the layer's mean."""
    half_keeps: float
    """Share of the squared activations in the strongest half of the neurons, the same half for all tokens."""
    means: tuple[float, ...]
    """Mean activation of each neuron, relative to the layer's mean."""


@dataclass(frozen=True)
class BlockProfile:
    """The activity in one block."""

    heads: Activity
    channels: Activity


class _Count:
    """Sums over tokens from which an `Activity` is made."""

    def __init__(self, neurons: int, device: torch.device) -> None:
        self.tokens = 0
        self.small = torch.zeros((), dtype=torch.int64, device=device)
        self.sum = torch.zeros(neurons, dtype=torch.float64, device=device)
        self.squares = torch.zeros(neurons, dtype=torch.float64, device=device)

    def add(self, strength: Tensor) -> None:
        """Count activations (tokens, neurons), none below zero."""
        largest = strength.amax(dim=1, keepdim=True)
        self.tokens += len(strength)
        self.small += (strength < SMALL * largest).sum() + (largest == 0).sum() * strength.shape[1]
        self.sum += strength.sum(dim=0, dtype=torch.float64)
        self.squares += strength.double().square().sum(dim=0)

    def activity(self) -> Activity:
        neurons = len(self.sum)
        relative = self.sum / self.sum.mean().clamp(min=torch.finfo(torch.float64).tiny)
        strongest = self.squares.sort(descending=True).values
        kept, total = float(strongest[: neurons // 2].sum()), float(strongest.sum())
        return Activity(
            barely_active=int(self.small) / (self.tokens * neurons),
            quiet=float((relative < QUIET).double().mean()),
            half_keeps=kept / total if total else 1.0,
            means=tuple(round(value, 6) for value in relative.tolist()),
        )


@dataclass(frozen=True, kw_only=True)
class ProfileSettings(OfText, OnDevice):
    """Measure how many heads and channels of a model are barely active: what sparse training may skip.

    Example: secateurs profile my-llama --text wikitext2 --output activity
    """

    text: str | Path
    """A file, a folder, or a name as `eval` takes it."""

    output: str | Path | None = None
    """A folder to make, for the figures (`profile.json`) and a picture (`profile.png` and `profile.svg`)."""

    samples: int = 32
    """Windows of the text to read: the first ones, or as many as there are."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit."""
        if self.samples < 1:
            raise ValueError(f"there must be at least 1 sample, not {self.samples}")
        resolve_device(self.device)


@takes(ProfileSettings)
def profile(model: str | Path, *, settings: ProfileSettings) -> list[BlockProfile]:
    """Measure how active the heads and channels of a model are on a text.

    Args:
        model: a Hugging Face model folder with safetensors, or a name on the hub. It is only read.

    Returns:
        A profile for each block.

    Raises:
        ValueError: the model, the text or the output folder do not suit; found before the model is loaded.
        FloatingPointError: an activation is NaN or infinite; names the block.
    """
    folder, text, output = resolve(model), settings.text, settings.output
    if output is not None and Path(output).exists():
        raise ValueError(f"'{output}' exists: give another output folder")
    length = sequence_length(settings.length, read_config(Checkpoint(folder)))
    tokens = evaluation_tokens(text, load_tokenizer(folder), field=settings.field)
    windows = min(settings.samples, len(tokens) // length)
    if not windows:
        raise ValueError(
            f"'{text}' has {len(tokens)} tokens, one window needs {length}: give more, or shorter windows"
        )
    blocks = measure_activity(
        load_model(folder, settings.device), tokens[: windows * length].view(windows, length)
    )
    if output is not None:
        record = {"model": str(model), "text": str(text), "windows": windows, "length": length}
        _write(Path(output), blocks, record)
    return blocks


@torch.inference_mode()
def measure_activity(model: PreTrainedModel, tokens: Tensor) -> list[BlockProfile]:
    """The activity in each block of a model, which runs where it is and stays as it was.

    Args:
        model: of a supported family, in evaluation mode.
        tokens: (windows, length) ids.

    Raises:
        FloatingPointError: an activation is NaN or infinite; names the block.
    """
    family = family_of(model.config)
    sizes = family.sizes(model.config)
    blocks = list(model.get_submodule(family.blocks).children())
    heads = [_Count(sizes.heads, model.device) for _ in blocks]
    channels = [_Count(sizes.channels, model.device) for _ in blocks]

    def heads_of(count: _Count) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            count.add(inputs[0].float().reshape(-1, sizes.heads, sizes.head_dim).norm(dim=2))

        return note

    def channels_of(count: _Count) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            count.add(inputs[0].float().reshape(-1, sizes.channels).abs())

        return note

    handles = []
    for index, block in enumerate(blocks):
        for role, note in (("o", heads_of(heads[index])), ("down", channels_of(channels[index]))):
            layer = block.get_submodule(family.roles[role].name)  # type: ignore[index]
            handles.append(layer.register_forward_pre_hook(note))
    try:
        for batch in tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1])):
            # Not the head: its logits are the largest tensor of all, and nobody reads them.
            model.get_decoder()(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for index, counts in enumerate(zip(heads, channels, strict=True)):
        if not all(count.squares.isfinite().all() for count in counts):
            raise FloatingPointError(f"the activations of '{family.blocks}.{index}' hold NaN or Inf")
    return [
        BlockProfile(head.activity(), channel.activity())
        for head, channel in zip(heads, channels, strict=True)
    ]


def table(blocks: list[BlockProfile]) -> "Table":
    """The profile as text, a row for each block."""
    from rich.table import Table

    shown = Table(
        title="activity on this text",
        caption=f"barely active: share of activations below {SMALL:.0%} of the largest at the same token. "
        f"quiet: share of neurons below {QUIET:.0%} of the layer's mean. half keeps: share of the squared "
        "activations in the strongest half of the neurons, the same half for all tokens.",
    )
    shown.add_column("block", justify="right")
    for kind in ("heads", "channels"):
        for measure in ("barely active", "quiet", "half keeps"):
            shown.add_column(f"{kind}\n{measure}", justify="right")
    for index, block in enumerate(blocks):
        cells = [
            f"{value:.1%}"
            for kind in (block.heads, block.channels)
            for value in (kind.barely_active, kind.quiet, kind.half_keeps)
        ]
        shown.add_row(str(index), *cells)
    return shown


def _write(output: Path, blocks: list[BlockProfile], settings: dict[str, Any]) -> None:
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_json(
            partial / "profile.json", {"settings": settings, "blocks": [asdict(block) for block in blocks]}
        )
        draw(blocks, partial / "profile")
        os.rename(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def draw(blocks: list[BlockProfile], stem: Path) -> None:
    """Draw the profile to `stem` with the suffixes .png and .svg.

    Above, the mean activation of every neuron, strongest first, a line for each block; below, the share of
    activations that are barely active, block by block.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharey="row")
    colours = colormaps["viridis"].resampled(len(blocks))
    for column, kind in enumerate(("heads", "channels")):
        above, below = axes[0, column], axes[1, column]
        activities: list[Activity] = [getattr(block, kind) for block in blocks]
        for index, activity in enumerate(activities):
            means = sorted(activity.means, reverse=True)
            ranks = [100 * (rank + 0.5) / len(means) for rank in range(len(means))]
            above.plot(ranks, [max(value, 1e-3) for value in means], color=colours(index), label=str(index))
        above.set(title=kind, xlabel="% of the block's neurons, strongest first", yscale="log")
        above.axhline(QUIET, color="grey", linewidth=0.8, linestyle="--")
        above.grid(alpha=0.3)
        positions = range(len(blocks))
        below.bar(
            positions, [100 * x.barely_active for x in activities], color="tab:blue", label="barely active"
        )
        below.plot(
            positions, [100 * x.half_keeps for x in activities], "o-", color="tab:orange", label="half keeps"
        )
        below.set(xlabel="block", ylim=(0, 100))
    axes[0, 0].set_ylabel("mean activation / layer's mean")
    axes[1, 0].set_ylabel("%")
    axes[1, 1].legend(loc="lower right")
    if len(blocks) <= 12:
        axes[0, 1].legend(title="block", fontsize="small")
    for suffix in (".png", ".svg"):
        figure.savefig(stem.with_suffix(suffix), dpi=150)
