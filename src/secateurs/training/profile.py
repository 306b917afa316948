"""How many heads and channels of a pretrained model are barely active: the premise of sparse training.

A channel's activation is its entry in the input of `down`, a head's the norm of its slice of the input of
`o`. That few of them are large at any token is known as the lazy neuron phenomenon (arXiv 2210.06313); with
ReLU the others are exactly zero (2310.04564), with a smooth activation merely small, so that a threshold
takes the place of zero (2404.08763), and heads are compared by their norms (2310.17157). Sparsity-Accelerated
Training (2406.01392) omits the same neurons for a whole batch, so what a fixed set keeps is shown as well.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateurs.anatomy import BlockAnatomy, anatomy_of
from secateurs.anatomy.blocks import decoder_of
from secateurs.checkpoint import Checkpoint, check_output, new_folder, resolve, write_json
from secateurs.device import resolve_device
from secateurs.runtime.load import load_model
from secateurs.settings import OfText, OnDevice, takes
from secateurs.text import evaluation_tokens, load_tokenizer
from secateurs.training.model import read_config, sequence_length
from secateurs.training.units import dense_mlp

if TYPE_CHECKING:
    from rich.table import Table

SMALL = 0.1  # of the largest activation in the layer at the same token: the neuron is barely active
QUIET = 0.5  # of the layer's mean activation: the neuron is quiet over the whole text
TOKENS_AT_ONCE = 2048

KINDS = ("heads", "channels")
"""What is looked at, as the fields of a profile are called."""


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
    """The activity in one block; None of what it has none of."""

    heads: Activity | None
    channels: Activity | None


class _Count:
    """Sums over tokens from which an `Activity` is made.

    Args:
        reader: the layer, within the block, that is given what the neurons hand on.
        neuron: (inputs of the reader,): the neuron that each belongs to, of which all have as many.
        device: where the model is.
    """

    def __init__(self, reader: str, neuron: Tensor, device: torch.device) -> None:
        self.reader = reader
        self.order = neuron.argsort(stable=True).to(device)
        self.tokens, neurons = 0, int(neuron.max()) + 1
        self.small = torch.zeros((), dtype=torch.int64, device=device)
        self.sum = torch.zeros(neurons, dtype=torch.float64, device=device)
        self.squares = torch.zeros(neurons, dtype=torch.float64, device=device)

    def note(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Count what the reader is given."""
        by_neuron = (
            inputs[0].float()[..., self.order].reshape(-1, len(self.sum), len(self.order) // len(self.sum))
        )
        self.add(by_neuron.norm(dim=2))

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
        OSError: the disk is full.
    """
    folder, text, output = resolve(model), settings.text, settings.output
    checkpoint = Checkpoint(folder)
    if output is not None:
        check_output(Path(output), checkpoint, 0)
    config = read_config(checkpoint)
    if not any(inside.heads or dense_mlp(inside) for inside in anatomy_of(config).blocks):
        raise ValueError(f"the blocks of '{model}' have neither heads nor channels that could be told apart")
    length = sequence_length(settings.length, config)
    tokens = evaluation_tokens(text, load_tokenizer(folder), field=settings.field)
    windows = min(settings.samples, len(tokens) // length)
    if not windows:
        raise ValueError(
            f"'{text}' has {len(tokens)} tokens, one window needs {length}: give more, or shorter windows"
        )
    record = {"model": str(model), "text": str(text), "windows": windows, "length": length}
    with ExitStack() as stack:
        place = output and stack.enter_context(new_folder(Path(output)))
        blocks = measure_activity(
            load_model(folder, settings.device), tokens[: windows * length].view(windows, length)
        )
        if place:
            shown = {"settings": record, "blocks": [asdict(block) for block in blocks]}
            write_json(place / "profile.json", shown)
            draw(blocks, place / "profile")
    return blocks


@torch.inference_mode()
def measure_activity(model: PreTrainedModel, tokens: Tensor) -> list[BlockProfile]:
    """The activity in each block of a model, which runs where it is and stays as it was.

    Args:
        model: a decoder, in evaluation mode.
        tokens: (windows, length) ids.

    Raises:
        FloatingPointError: an activation is NaN or infinite; names the block.
    """
    anatomy = anatomy_of(model.config)
    blocks: Any = model.get_submodule(anatomy.path)
    counts = [_counted(inside, model.device) for inside in anatomy.blocks]
    handles = [
        block.get_submodule(count.reader).register_forward_pre_hook(count.note)
        for block, found in zip(blocks, counts, strict=True)
        for count in found.values()
    ]
    try:
        for batch in tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1])):
            # Not the head: its logits are the largest tensor of all, and nobody reads them.
            decoder_of(model)(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for index, found in enumerate(counts):
        if not all(count.squares.isfinite().all() for count in found.values()):
            raise FloatingPointError(f"the activations of '{anatomy.path}.{index}' hold NaN or Inf")
    return [
        BlockProfile(**{kind: found[kind].activity() if kind in found else None for kind in KINDS})
        for found in counts
    ]


def _counted(inside: BlockAnatomy, device: torch.device) -> dict[str, _Count]:
    """What there is to count in a block, of each kind."""
    found: dict[str, _Count] = {}
    if inside.heads is not None:
        found["heads"] = _Count(inside.heads.reader, inside.heads.columns, device)
    if (mlp := dense_mlp(inside)) is not None:
        found["channels"] = _Count(mlp.down.name, torch.arange(mlp.down.shape[1]), device)
    return found


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
    for kind in KINDS:
        for measure in ("barely active", "quiet", "half keeps"):
            shown.add_column(f"{kind}\n{measure}", justify="right")
    for index, block in enumerate(blocks):
        cells = [
            cell
            for activity in (block.heads, block.channels)
            for cell in (
                ["-"] * 3
                if activity is None
                else [
                    f"{value:.1%}" for value in (activity.barely_active, activity.quiet, activity.half_keeps)
                ]
            )
        ]
        shown.add_row(str(index), *cells)
    return shown


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
    for column, kind in enumerate(KINDS):
        above, below = axes[0, column], axes[1, column]
        found = {index: getattr(block, kind) for index, block in enumerate(blocks)}
        activities: dict[int, Activity] = {index: activity for index, activity in found.items() if activity}
        for index, activity in activities.items():
            means = sorted(activity.means, reverse=True)
            ranks = [100 * (rank + 0.5) / len(means) for rank in range(len(means))]
            above.plot(ranks, [max(value, 1e-3) for value in means], color=colours(index), label=str(index))
        above.set(title=kind, xlabel="% of the block's neurons, strongest first", yscale="log")
        above.axhline(QUIET, color="grey", linewidth=0.8, linestyle="--")
        above.grid(alpha=0.3)
        positions, shown = list(activities), activities.values()
        below.bar(positions, [100 * x.barely_active for x in shown], color="tab:blue", label="barely active")
        below.plot(
            positions, [100 * x.half_keeps for x in shown], "o-", color="tab:orange", label="half keeps"
        )
        below.set(xlabel="block", xlim=(-0.6, len(blocks) - 0.4), ylim=(0, 100))
    axes[0, 0].set_ylabel("mean activation / layer's mean")
    axes[1, 0].set_ylabel("%")
    axes[1, 1].legend(loc="lower right")
    if len(blocks) <= 12:
        axes[0, 1].legend(title="block", fontsize="small")
    for suffix in (".png", ".svg"):
        figure.savefig(stem.with_suffix(suffix), dpi=150)
