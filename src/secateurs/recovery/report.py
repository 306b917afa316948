"""What a recovery did, in Python and under `recovery` in `secateurs.json` in the output folder."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from secateurs.calibration.sequences import in_words
from secateurs.checkpoint import RECORD, read_json
from secateurs.training.report import TrainerReport

KEY = "recovery"


@dataclass(frozen=True)
class RecoveryReport(TrainerReport):
    """What a recovery did."""

    title: ClassVar = "recovered"
    tags: ClassVar = ("pruned", "sparse", "recovered")

    output: Path
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    """Spent on training steps, without loading, measuring and saving, over all sessions of a resumed run."""
    steps: int
    tokens: int
    """Trained on."""
    peak_memory_bytes: int
    """Of the process, or of the GPU's tensors."""
    zeros: int
    """Weights of the blocks' matrices that were held at zero."""
    before: float
    """Mean over the positions of held-out text: KL(dense || pruned) in nats, mixed with the text's own loss
    if that was asked for."""
    after: float
    """The same of the trained weights, as they are stored."""
    rounded: int = 0
    """Weights that stayed on their grids, in the proportions of their levels: their scales were trained."""
    history: list[dict[str, float]] | None = None
    """What was logged on the way, see `secateurs.training.loop.history`; older records have none."""

    @property
    def kept(self) -> bool:
        """Whether the trained weights are those in the folder: only if they do better on held-out text."""
        return self.after < self.before

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What a model card says of the run."""
        settings, calibration = self.settings, self.settings["calibration"]
        text = in_words(calibration)
        facts = [
            ("Trained towards", Path(settings["towards"]).name),
            ("Steps", f"{self.steps}, {self.tokens} tokens"),
            ("Text", " ".join(Path(part).name for part in text.split(" "))),
            ("Divergence on held-out text", f"{self.before:.4f} before, {self.after:.4f} after"),
        ]
        if settings["text_loss"]:
            facts.append(("Share of the text's own loss", f"{settings['text_loss']:g}"))
        if settings["lora"]:
            facts.append(("LoRA", f"rank {settings['lora']}, merged"))
        if not self.kept:
            facts.append(("Weights", "as they were: nothing was gained"))
        return [*facts, ("secateurs", self.versions["secateurs"])]

    @classmethod
    def read(cls, folder: Path) -> "RecoveryReport":
        """The report of a recovered model's folder; ValueError if it has none."""
        content = read_json(folder / RECORD).get(KEY)
        if content is None:
            raise ValueError(f"'{folder / RECORD}' is not the record of a recovery")
        names = {field.name for field in dataclasses.fields(cls)} - {"output"}
        return cls(output=folder, **{name: content[name] for name in names & content.keys()})

    def __str__(self) -> str:
        lines = [
            f"{self.output}: {self.steps} steps, {self.tokens} tokens in {self.seconds:.1f} s, "
            f"{self.tokens / self.seconds:.0f} tokens per second, "
            f"peak memory {self.peak_memory_bytes / 1e6:.0f} MB"
        ]
        if self.rounded:
            lines.append(f"{self.rounded} weights stay on the grids that they were rounded to")
        what = f"divergence from {self.settings['towards']} on held-out text: {self.before:.4f} before, "
        lines.append(f"{what}{self.after:.4f} after")
        if not self.kept:
            lines.append("nothing was gained: the weights are as they were")
        return "\n".join(lines)
