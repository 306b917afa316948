"""Sparsity-accelerated training under axolotl: a plugin that its YAML names.

    plugins:
      - secateurs.integrations.axolotl.SparsityAcceleratedTrainingPlugin
    omission: 0.5

axolotl makes its Trainer, loggers and all, and then hands it over: sparse steps come before all other
callbacks, so that loggers are told of them. What its YAML may say is `SparseArguments`, checked when read.
"""

from typing import Any, Literal

from pydantic import BaseModel, model_validator
from transformers import Trainer

from secateurs.training.callback import SparsityAcceleratedTraining
from secateurs.training.importance import Importance
from secateurs.training.selection import Select
from secateurs.training.settings import ScheduleName
from secateurs.training.sparse import PROBE_EVERY, RATE

try:
    from axolotl.integrations.base import BasePlugin
except ModuleNotFoundError as error:
    if error.name != "axolotl":
        raise
    raise ImportError("this is a plugin of axolotl, which is not installed: pip install axolotl") from None


class SparseArguments(BaseModel):
    """What axolotl's YAML may say of sparse steps, see `secateurs.SparsityAcceleratedTraining`.

    axolotl mixes it into its own schema, so that names are those of one table with its own.
    """

    omission: float | Literal["auto"] = RATE
    """Highest share of heads and channels that a step skips, in [0, 1); 0 is plain training."""

    omission_schedule: ScheduleName = "ladder"
    """How the share goes from the highest to 0."""

    omission_importance: Importance = "weighted"
    """What decides which are skipped."""

    omission_select: Select = "topk"
    """The most important ones, or a sample in proportion to importance."""

    omission_probe_every: int = PROBE_EVERY
    """Optimiser steps between two measurements of importance."""

    @model_validator(mode="after")
    def check_omission(self) -> "SparseArguments":
        """Raises ValueError for a setting that is none of sparse training's."""
        callback_of(self)
        return self


def callback_of(settings: Any) -> SparsityAcceleratedTraining:
    """The callback that settings ask for."""
    return SparsityAcceleratedTraining(
        settings.omission,
        schedule=settings.omission_schedule,
        importance=settings.omission_importance,
        select=settings.omission_select,
        probe_every=settings.omission_probe_every,
    )


class SparsityAcceleratedTrainingPlugin(BasePlugin):
    """Adds sparse steps to whatever axolotl trains with a Trainer."""

    def get_input_args(self) -> str:
        """Where axolotl finds what its YAML may say."""
        return f"{__name__}.{SparseArguments.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Put the callback before all others.

        Args:
            cfg: axolotl's settings, `SparseArguments` among them.
            trainer: what it is about to call `train` of.
        """
        if cfg.omission:
            trainer.callback_handler.callbacks.insert(0, callback_of(cfg))
