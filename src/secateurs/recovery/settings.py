"""What `recover` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateurs.calibration.sources import SELF, Calibration, counts_of, sources_of
from secateurs.checkpoint.shards import size_in_bytes
from secateurs.device import multiplies_bfloat16, resolve_device
from secateurs.settings import InWindows
from secateurs.training.arguments import DEFAULTS, hardware
from secateurs.training.settings import needs

STEP_TOKENS = 512
"""Tokens to an optimiser step, where sequences are not longer. At equal tokens smaller steps lead further,
being more: there is little noise in gradients towards whole distributions."""

SAMPLES = 4096
"""Sequences by default, at most."""

LEARNING_RATE = 1.5e-4
LORA_LEARNING_RATE = 5e-4
"""Of steps of `STEP_TOKENS` tokens. Of larger ones, more by the root of how much larger they are (Malladi et
al., arXiv 2205.10287)."""

WARMUP = 0.05


@dataclass(frozen=True, kw_only=True)
class RecoverSettings(InWindows):
    """Train what is left of a pruned model towards the dense model's predictions.

    Zeros stay where they are. Text held out decides whether the new weights are kept. Interrupt it whenever
    you like: the same command continues from the last checkpoint.

    Example: secateurs recover my-llama-80 --towards my-llama --calibration text.txt --output my-llama-80-r
    """

    output: str | Path
    """The folder to make. It must not exist, unless this same command began it."""

    towards: str | Path
    """The dense model: a folder, a .gguf file, or a name on the hub. Any with the same vocabulary will do."""

    calibration: Calibration = SELF
    """Text to train on, as `prune` takes it: a file, a folder, a dataset's name, or several with shares. By
    default self: the dense model writes it."""

    tokens: int = 1_000_000
    """To train on, 512 to a step. Text that has fewer is repeated."""

    samples: int | None = None
    """Sequences to draw from the text. By default as many as the tokens make, at most 4096 and what there
    is."""

    text_loss: float = 0.0
    """The share of the text's own loss, in [0, 1], in what is lowered; the rest is that of the divergence."""

    lora: int | None = None
    """Train adapters of this rank, which are merged into the weights at the end, and not the weights
    themselves: for want of memory."""

    learning_rate: float | None = None
    """Its peak. By default 1.5e-4, with LoRA 5e-4, times the root of how many times 512 tokens a step has.
    Small models bear more (docs/recover.md)."""

    warmup: float | None = None
    """Steps until then, or below 1 their share of all steps. By default 0.05. From there on it falls to 0."""

    batch_size: int | None = None
    """Sequences on each device at once. By default a step's; of more than that a step has more tokens."""

    seed: int = 0
    """Of the text's sample, its order, and all else that is random."""

    settings: str | Path | None = None
    """A YAML file with any of Trainer's settings (`transformers.TrainingArguments`), gradient_checkpointing
    say; the options here come before it."""

    report_to: tuple[str, ...] = ()
    """Loggers that Trainer knows: tensorboard, wandb, mlflow..."""

    device: str | None = None
    """cpu or cuda. By default a GPU if there is one."""

    max_shard_size: str | int = "5GB"
    """The largest a file of weights may be: 500MB, 5GB, or a number of bytes."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit, alone or together."""
        if self.tokens < 1:
            raise ValueError(f"tokens are at least 1, not {self.tokens}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples are at least 1, not {self.samples}")
        if not isinstance(self.calibration, Tensor):
            counts_of(sources_of(self.calibration), self.samples or SAMPLES)
        if not 0 <= self.text_loss <= 1:
            raise ValueError(f"text_loss is a share from 0 to 1, not {self.text_loss}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is a number of sequences, not {self.batch_size}")
        if self.lora is not None:
            needs("peft")
            if self.lora < 1:
                raise ValueError(f"the rank of LoRA is at least 1, not {self.lora}")
        size_in_bytes(self.max_shard_size)
        hardware(self.device)

    def sequences(self, length: int) -> int:
        """How many of that length are to be drawn."""
        return self.samples or min(-(-self.tokens // length), SAMPLES)

    def defaults(self, length: int, processes: int, *, at_once: int | None = None) -> dict[str, Any]:
        """Trainer's settings by default, for sequences of that length.

        A step has 512 tokens on all devices together, or one sequence on each.

        Args:
            length: tokens in a sequence.
            processes: devices.
            at_once: sequences on each at once, where `batch_size` does not say.
        """
        sequences = max(1, STEP_TOKENS // length // processes)
        at_once = self.batch_size or at_once or sequences
        return {
            **DEFAULTS,
            **hardware(self.device),
            "bf16": multiplies_bfloat16(resolve_device(self.device)),
            "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": max(1, sequences // at_once),
            "warmup_steps": WARMUP,
        }

    def rate(self, tokens: int) -> float:
        """The learning rate by default, of steps of so many tokens."""
        rate = LORA_LEARNING_RATE if self.lora else LEARNING_RATE
        return rate * max(1.0, tokens / STEP_TOKENS) ** 0.5

    @property
    def trainer(self) -> dict[str, Any]:
        """What is given here of Trainer's settings, by their names there."""
        named = {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup,
            "seed": self.seed,
            "report_to": list(self.report_to) or None,
        }
        return {name: value for name, value in named.items() if value is not None}
