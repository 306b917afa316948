"""What `plan` can be told: all that `prune` can, and for which machine."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from secateurs.calibration.sources import Calibration, counts_of, sources_of
from secateurs.planning.machine import CARDS
from secateurs.pruning.settings import PruneSettings
from secateurs.pruning.solvers.magnitude import Magnitude

SOME_TEXT = "some text"
"""Stands for what was not named and is needed: what it says makes no difference."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings(PruneSettings):
    """Say what a run of `prune` will take of memory, disk and time, from the model's config.json alone.

    It takes whatever `prune` takes: put plan in the place of prune.

    Example: secateurs plan my-llama --device h100 --method sparsellm --samples 128
    """

    output: str | Path = ""
    """As `prune` takes it. It is not looked at."""

    calibration: Calibration | None = None
    """As `prune` takes it. What is read is not looked at; what the model writes (self) takes time. By default
    some text that is read, and for magnitude none."""

    device: str | None = None
    """cpu or cuda, which are tested for a second; or a card that need not be here, by what its maker
    publishes: a100, h100, h200, rtx4090, l40s. By default a GPU if there is one."""

    ranks: int = 1
    """Processes that share the run, each with a device of its own."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit, as `prune` does."""
        if self.card is None and self.device is not None and not self.device.startswith(("cpu", "cuda")):
            raise ValueError(f"'{self.device}' is no device: use cpu, cuda, or a card: {', '.join(CARDS)}")
        if self.calibration is None and not self._does_without:
            object.__setattr__(self, "calibration", SOME_TEXT)
        super().__post_init__()
        if not isinstance(self.ranks, int) or self.ranks < 1:
            raise ValueError(f"ranks are a number of processes, not {self.ranks}")
        if self.samples < self.ranks:
            raise ValueError(f"{self.samples} samples do not go round {self.ranks} ranks: give one for each")

    @property
    def card(self) -> str | None:
        """The name of a card that need not be here."""
        name = (self.device or "").lower().replace(" ", "").replace("-", "")
        return name if name in CARDS else None

    @property
    def here(self) -> str | None:
        """See `PruneSettings.here`: what stands for a card that need not be."""
        return "cpu" if self.card else self.device

    @property
    def _does_without(self) -> bool:
        """Whether `prune` would do so without text: magnitude by itself."""
        alone = isinstance(self.solver, Magnitude) and self.aim == "layer" and self.share_of_experts == 1
        return alone and not self.is_bounded and not self.recover

    def written(self, samples: int) -> int:
        """How many of so many sequences the model writes itself."""
        if self.calibration is None or isinstance(self.calibration, Tensor):
            return 0
        sources = sources_of(self.calibration)
        counts = counts_of(sources, samples)
        return sum(count for source, count in zip(sources, counts, strict=True) if source.writer)
