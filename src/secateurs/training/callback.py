"""The Trainer callback: all that a user of `transformers.Trainer` or TRL adds."""

from collections.abc import Collection
from typing import Any, Literal

from transformers import TrainerCallback

from secateurs.training.ladder import Schedule

Importance = Literal["uniform", "magnitude", "activation", "weighted", "taylor"]
Select = Literal["topk", "sample"]


class SparsityAcceleratedTraining(TrainerCallback):
    """Sparsity-Accelerated Training for `transformers.Trainer` and everything built on it.

    Example:
        Trainer(model, args, train_dataset=data, callbacks=[SparsityAcceleratedTraining(rate=0.5)]).train()

    Args:
        rate: highest share of heads and channels that a step omits, in [0, 1); 0.5 if left out.
        schedule: "ladder" (LORS), "constant", "linear", "cubic", or a schedule (which brings its own rate).
        importance: what decides: "uniform", "magnitude", "activation", "weighted" or "taylor".
        select: "topk", or "sample" without replacement in proportion to importance.
        attention_rate: the highest rate of the attention heads, if not `rate`.
        mlp_rate: the highest rate of the MLP channels, if not `rate`.
        exempt: indices of blocks that always run whole; negative ones count from the end.
        probe_every: optimiser steps between measurements of importance on a few dense sequences.
        across_layers: share the budget of each kind out across layers by importance, instead of evenly.
        seed: of the sampling.

    Raises:
        ValueError: a setting is out of its range, or unknown.
    """

    def __init__(
        self,
        rate: float | None = None,
        *,
        schedule: str | Schedule = "ladder",
        importance: Importance = "activation",
        select: Select = "topk",
        attention_rate: float | None = None,
        mlp_rate: float | None = None,
        exempt: Collection[int] = (),
        probe_every: int = 20,
        across_layers: bool = False,
        seed: int = 0,
    ) -> None:
        self.training: SparseTraining | None = None
        """The run's state, from the start of training on: what progress bars and summaries read."""


class SparseTraining:
    """SAT in a plain PyTorch loop, in three calls; the Trainer callback makes the same three.

    Example:
        sat = SparseTraining(rate=0.5)          # the callback's keywords
        sat.attach(model, optimizer, total_steps=1000)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            sat.step()
            optimizer.zero_grad()
        sat.detach()                            # the plain, dense model again

    In evaluation mode (`model.eval()`) the model always runs whole; `state_dict` is always whole.
    """

    rate: float
    """Of the current optimiser step."""
    flops_done: float
    """Spent so far by the forward and backward passes of the model, probes included."""
    flops_dense: float
    """What plain training would have spent on the same tokens."""
    kept: list[Any]
    """For each block the kept heads and channels."""
